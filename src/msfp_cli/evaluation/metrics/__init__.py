"""The metrics of an evaluation: `table` lists them, one row each.

`evidence` is what is gathered of a model, `compute` turns it into numbers, and `distances` has the
formulas; `denoisers` compares denoisers with full precision, as a whole and layer by layer.
"""
