"""Experiments: every strategy over several splits and seeds, and what the differences come to.

`splits` redraws records, `summary` compares, `page` turns experiment.json into one self-contained HTML page.
"""
