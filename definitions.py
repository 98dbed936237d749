"""The door for Dagster in a clone."""

from prism_assets.definitions import defs

__all__ = ["defs"]
