"""An exported pipeline: `export` writes it, diffusers reads it by `quantizer`, `pipeline` wraps it.

`registration` makes diffusers know the format as soon as it is imported.
"""
