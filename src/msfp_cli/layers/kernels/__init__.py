"""Ways to execute a quantized layer: a file each.

`kernel` says what a kernel is, `registry` lists them and chooses one for a layer.
"""
