"""Explanation: why a candidate stands where it stands."""
