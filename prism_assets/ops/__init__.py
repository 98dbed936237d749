"""Operations: automation, runs and their processes, `prism run`, housekeeping."""
