"""Evaluation: what a selection bought, measured on held-out examples, plotted and written down.

`metrics` computes, `plots` draws PNG images, `report` turns report.json into one self-contained HTML page.
"""
