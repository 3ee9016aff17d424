"""The search for the best placement: what is tried, on which images, when it ends, and what may be said of it."""
