"""Models that no library has, as plain modules: what a host needs and nothing of token reduction."""
