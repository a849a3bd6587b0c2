"""An exported pipeline: `export` writes it, diffusers reads it by `quantizer`, `pipeline` wraps it.

`engine` lets OpenVINO run its denoisers, and `convert` stores what that needs. `registration` makes
diffusers know the format as soon as it is imported.
"""
