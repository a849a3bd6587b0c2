"""An exported pipeline: `export` writes it, `quantizer` is how diffusers reads it, `pipeline` wraps it.

`registration` makes diffusers know the format as soon as it is imported.
"""
