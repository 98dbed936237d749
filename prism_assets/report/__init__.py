"""The report: the results for a target, as data, sentences and one HTML page."""
