"""What a folder of images holds: its splits, its files, its labels, and images that stand in it twice."""
