"""Where results are kept, looked up and watched."""
