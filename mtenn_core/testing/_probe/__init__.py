"""Tools of the checks: poses, finite differences, comparisons, and likely causes."""
