"""What the runtime knows of a library's models."""
