"""The quality won back: `recipe`, `finetune` (the verb), `result` (on disk).

`lora` is a layer with a hub, `router` chooses its member, `student` is the denoiser made of both,
`batches` draws the rows, and `trainer` does the updates.
"""
