"""From an opened session to finished trials, in one process or on Ray."""
