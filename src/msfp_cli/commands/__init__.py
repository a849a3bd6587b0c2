"""The command line: one file for each command, and `app`, which has them all.

A command parses, calls one library function, prints, and returns. Nothing here imports torch at the
top: ``msfp --help`` has to answer at once. `console` prints, `options` are shared, and `launch`
starts several processes.
"""
