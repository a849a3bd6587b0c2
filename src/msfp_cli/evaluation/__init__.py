"""An export against full precision: `recipe`, `evaluate` (the verb), `result` (on disk).

An evaluation is settled by a `plan` and may be interrupted (`resume`). It compares `models`, whose
`identity` is checked; `material` is what they draw (a `gallery` of pictures each) and what is
recorded of them. `measure` gathers what is known of one model and computes the `metrics` of it, by
`features` of its pictures, beside pictures of a `reference`, and with what it takes to run, its
`cost`.
"""
