"""What the data say, computed once for words, tables and figures alike: no sentence, no picture."""
