"""Tables of poses: read their rows, combine the poses of each compound, and write the results.

Nothing here imports torch or polars before a table is read.
"""
