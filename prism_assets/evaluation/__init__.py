"""Evaluation: the effect of a selection, measured on held-out records and on benchmarks."""
