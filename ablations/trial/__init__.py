"""What is asked, as values: trials, recipes, free settings, labels, the code a key covers."""
