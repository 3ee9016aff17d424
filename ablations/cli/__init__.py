"""The command line: one file a command, ``main`` that finds them, ``options`` that they share.

No file here imports torch before its command is carried out: help, ``list``, ``status`` and ``log`` answer at once.
"""
