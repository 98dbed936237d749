"""Evaluation: what a selection bought, measured on held-out records and on benchmarks."""
