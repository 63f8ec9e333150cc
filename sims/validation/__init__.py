"""The validation page: every published figure that the cluster model can be held against, ours and the error beside it.

`python -m sims validate` makes it again from committed data alone.
"""
