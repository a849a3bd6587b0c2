"""Files of ours: `atomic` writes one, `documents` reads and writes what it holds.

`directories` replaces a directory whole, if it is ours.
"""
