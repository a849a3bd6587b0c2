"""Denoiser calls, recorded while the pipeline runs: `recipe`, `record` (the verb), `result`.

`compare` measures a denoiser against its recording, by timestep and by layer.
"""
