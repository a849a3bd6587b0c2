"""The quality won back: `recipe`, `finetune` (the verb), `result` (on disk), `quantize` (its use).

`load` reads what a run holds, and `task` says what a denoiser is trained on, whose rows `batches`
draws. `lora` is a layer with a hub, `router` chooses its member, `student` is the denoiser made of
both. `trainer` does the updates, and `distributed` adds them up over processes. `inspect` says what
was learned.
"""
