"""What a simulation leaves behind: Parquet, a trace for Perfetto, heat maps and figures.

Nothing is imported here: pyarrow and matplotlib take half a second each, and a sweep's worker needs neither.
"""
