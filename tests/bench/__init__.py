"""`make bench`: this project's speed on one CPU core beside transformers' and beside what the core can do.

Timings are interleaved in one run, and ratios are what is reported: a shared machine drifts.  Not a test: nothing here is asserted but
that both sides compute the same.
"""
