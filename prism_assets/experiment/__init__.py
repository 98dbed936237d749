"""Experiments: every strategy over several splits and seeds, and the differences between them.

`splits` redraws records, `summary` compares, `page` turns experiment.json into one self-contained HTML page.
"""
