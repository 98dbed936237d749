"""The catalogue: lineage, and SQL views over what a lake holds."""
