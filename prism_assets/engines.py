"""The engines that settings describe, and a Stage over them for work outside of Dagster: commands, notebooks,
benchmarks."""

from typing import Any

from prism_assets.identity import ENGINES, INDEX, LAKE, MODEL
from prism_assets.resources.index.store import VectorStore
from prism_assets.resources.lake import Lake
from prism_assets.resources.model.language_model import LanguageModel
from prism_assets.settings import Settings
from prism_assets.stage import Stage


def open_lake(settings: Settings) -> Lake:
    """The lake of these settings; nothing is made or read before it is asked for."""
    return Lake(root=str(settings.storage.root))


def build_engines(settings: Settings) -> dict[str, Any]:
    """The engines by the names that `build_definitions(resource_overrides=...)` takes."""
    model = settings.model
    lake = open_lake(settings)
    return {
        LAKE: lake,
        MODEL: LanguageModel(
            name=model.name,
            revision=model.revision,
            adapter=model.adapter,
            adapter_base=model.adapter_base,
            dtype=model.dtype,
            quantization=model.quantization,
            device=model.device,
            trust_remote_code=model.trust_remote_code,
            known_hashes=str(lake.cache_file("model-files.json")),
        ),
        INDEX: VectorStore(device=model.device),
    }


def open_stage(settings: Settings) -> Stage:
    """A Stage over the lake of these settings; nothing is read before it is asked for."""
    engines = build_engines(settings)
    return Stage(settings, *(engines[name] for name in ENGINES))
