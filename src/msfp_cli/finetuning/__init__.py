"""The quality won back: `recipe`, `finetune` (the verb), `result` (on disk), `quantize` (its use).

`load` reads what a run holds, and `task` says what a denoiser is trained on: `batches` draws the
rows, `loss_weights` weighs their timesteps. `lora` is a layer with a hub, `router` chooses its
member, `student` is the denoiser made of both. `trainer` does the updates, and `distributed` adds
them up over processes.
"""
