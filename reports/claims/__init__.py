"""The paper's claims, each beside what this code recomputes: `python -m reports claims`.

`data/*.yaml` holds what was published and where; `closed`, `simulated` and `measured` hold how ours is obtained; `rows` puts the two
together and computes the verdict; `page` says it.
"""
