"""Let the kernels of a GPU compete for a layer, because none is the fastest everywhere.

`measured` lets them run the layer on its own input, `exactness` says which of them are right, and
`winners` remembers which one won.
"""
