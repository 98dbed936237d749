"""PRISM data selection as Dagster assets: the method, a folder a stage, in the order the data flows.

For a deployment of your own:

    from prism_assets import build_definitions, load_settings

    defs = build_definitions(load_settings("prism.yaml"), key_prefix="acme")

or, in a `defs.yaml`, the component `prism_assets.PrismProject`. Nothing is imported before it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism_assets.component import PrismProject
    from prism_assets.definitions import build_definitions
    from prism_assets.engines import open_stage
    from prism_assets.settings import Settings, load_settings

__all__ = ["PrismProject", "Settings", "build_definitions", "load_settings", "open_stage"]

_WHERE = {
    "PrismProject": "prism_assets.component",
    "Settings": "prism_assets.settings",
    "build_definitions": "prism_assets.definitions",
    "load_settings": "prism_assets.settings",
    "open_stage": "prism_assets.engines",
}


def __dir__() -> list[str]:
    return __all__  # `dg` looks here for the component


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
