"""What is loaded: models by name, and their weights."""
