"""All that touches a stock pipeline: which one, loading it, calling it, and watching its denoiser.

`source` says which model, `loading` loads it, `conditions` and `sampling` call it, `denoiser` finds
its denoiser and replays calls, `watch` reports what happens inside, `rows` joins recorded rows, and
`denoising_factor` says how much an error weighs at each timestep.
"""
