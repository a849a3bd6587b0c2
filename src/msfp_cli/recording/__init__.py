"""Denoiser calls, recorded while the stock pipeline runs: `recipe`, `record` (the verb), `result` (on disk).

`compare` measures a denoiser against its recording, by timestep and by layer.
"""
