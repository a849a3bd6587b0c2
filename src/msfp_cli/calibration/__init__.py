"""Formats for every layer: `recipe`, `calibrate` (the verb), `result` (on disk).

`keep` reads the rules on bits, `observe` samples the inputs, `sensitivity` measures one layer
alone.
"""
