"""The code location of a clone, for Dagster."""

from prism_assets.definitions import defs

__all__ = ["defs"]
