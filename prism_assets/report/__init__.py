"""The report: what a target came to, as data, sentences and one HTML page."""
