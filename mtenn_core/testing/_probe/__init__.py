"""Probing a combination: poses, finite differences, comparison, likely causes."""
