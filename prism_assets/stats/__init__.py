"""Statistics: means over seeds, paired differences, rank correlations, each with its interval."""
