"""Tables of poses: read their rows, combine the poses of each compound, and write the results.

`table`, `rows`, `files` and the formats import neither torch nor polars before a table is read, so
that a wrong name is reported at once.
"""
