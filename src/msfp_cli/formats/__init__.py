"""Numbers: formats, rounding, packing, and the search; nothing here knows a layer or a pipeline.

`float_format` describes code books as plain integers, `rounding` brings reals to codes and back,
`packing` writes codes as bytes, `search` finds the best format, maximum and zero point, and
`compensation` rounds a weight for the output of its layer.
"""
