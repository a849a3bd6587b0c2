"""Engines run a whole denoiser instead of its layers: the denoiser is traced, converted, compiled.

`traced` has a layer's operators, `arguments` what a denoiser is called with, `tracing` converts it,
`conversions` has the files and `mapped` gives their pages back, `compilation` compiles one, changed
as `attention` and `convolution` say, where `devices` finds it exact, and `openvino` puts it
together. `package` is OpenVINO itself.
"""
