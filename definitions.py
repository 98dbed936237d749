"""The roof: every asset, job, schedule and sensor of the code location, wired from `prism.yaml`."""

import warnings
from collections.abc import Mapping
from typing import Any

import dagster as dg

# Backfill policies and pools are marked beta; a screenful of warnings at every load tells users nothing.
warnings.filterwarnings("ignore", category=dg.BetaWarning)

from prism_assets import automation
from prism_assets.corpus.assets import build_targets, candidates, live_pool
from prism_assets.evaluation.assets import build_evaluation, build_report_asset
from prism_assets.experiment.assets import build_experiment, build_experiment_trials
from prism_assets.features.assets import build_target_features, candidate_features, candidate_index
from prism_assets.processes import one_process, sleep_while_waiting
from prism_assets.reference.assets import base_model, warmup_checkpoints, warmup_sample
from prism_assets.selection.assets import build_selection, build_target_direction
from prism_assets.settings import Settings, load_settings
from prism_assets.training.assets import build_adapter
from prism_assets.trust.assets import build_trust
from resources.lake import Lake
from resources.language_model import LanguageModel
from resources.vector_store import VectorStore


def build_resources(settings: Settings) -> dict[str, Any]:
    """The engines that the settings describe."""
    model = settings.model
    return {
        "settings": settings,
        "lake": Lake(root=str(settings.storage.root)),
        "language_model": LanguageModel(
            name=model.name,
            revision=model.revision,
            adapter=model.adapter,
            dtype=model.dtype,
            device=model.device,
            trust_remote_code=model.trust_remote_code,
            cache=str(settings.storage.root / "cache"),
        ),
        "vector_store": VectorStore(device=model.device),
    }


def build_definitions(settings: Settings, resource_overrides: Mapping[str, Any] | None = None) -> dg.Definitions:
    """All definitions for these settings; tests and deployments exchange engines by `resource_overrides`."""
    assets = [
        base_model,
        candidates,
        build_targets(settings),
        live_pool,
        warmup_sample,
        warmup_checkpoints,
        candidate_features,
        candidate_index,
        build_target_features(settings),
        build_target_direction(settings),
        build_selection(settings),
        build_adapter(settings),
        build_evaluation(settings),
        build_report_asset(settings),
        build_trust(settings),
        build_experiment_trials(settings),
        build_experiment(settings),
    ]
    return dg.Definitions(
        assets=automation.conditioned(assets, settings),
        jobs=automation.build_jobs(),
        schedules=automation.build_schedules(settings),
        sensors=automation.build_sensors(),
        resources={**build_resources(settings), **(resource_overrides or {})},
        executor=one_process,
    )


sleep_while_waiting()
defs = build_definitions(load_settings())
