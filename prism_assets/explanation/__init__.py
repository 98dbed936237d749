"""Explanation: why a candidate ranks where it does."""
