"""PRISM data selection as Dagster assets: the method, a folder a stage, in the order the data flows."""
