"""An export against full precision: `recipe`, `evaluate` (the verb), `result` (on disk).

`models` are compared, `measure` fills in what is known of one, `metrics` lists what there is to
know, and `distances` has the formulas; `gallery` holds pictures, `cost` time and memory,
`reference` real pictures, and `features` extractors.
"""
