"""A quantized layer, and how it runs.

`scheme` says which formats and grids a layer has, `quantized` holds the codes, `replace` puts
quantized layers into a denoiser, `prepare` chooses their kernels, `routing` tells them the
timestep, `kernels` has a file for each way to run, and in `trial` they compete on a GPU.
"""
