"""Files of ours: `atomic` writes one, `documents` reads and writes what it holds.

`seal` says what msfp wrote into a directory, and `directories` replaces one whole, if
all in it is ours.
"""
