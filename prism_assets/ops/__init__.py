"""Operations: what runs without a hand, runs and their processes, `prism run`, housekeeping."""
