"""Engines run a whole denoiser instead of its layers: the denoiser is traced, converted, compiled.

`traced` has a layer's operators, `arguments` what a denoiser is called with, `conversions` the
files, `mapped` gives their pages back, and `openvino` puts it together.
"""
