"""Settings: the one schema of `prism.yaml`, and how the file is read."""

from prism_assets.settings.budget import Budget
from prism_assets.settings.load import config_path, from_mapping, load_settings
from prism_assets.settings.method import Rerank, RowScale, TargetSettings
from prism_assets.settings.schema import STRATEGIES, Settings

__all__ = [
    "STRATEGIES",
    "Budget",
    "Rerank",
    "RowScale",
    "Settings",
    "TargetSettings",
    "config_path",
    "from_mapping",
    "load_settings",
]
