"""From a YAML file to trials."""
