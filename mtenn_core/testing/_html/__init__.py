"""The HTML report: page, plots, and the numbers in the plots."""
