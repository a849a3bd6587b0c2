"""Formats for every layer: `recipe`, `calibrate` (the verb), `result` (on disk).

`denoiser_search` chooses for all layers of a denoiser, `layer_search` for one. `keep` reads the
rules on bits, `observe` samples the inputs, `sensitivity` quantizes one layer alone. `compensate`
rounds all weights for the outputs of their layers, of which `samples` keeps sums.
"""
