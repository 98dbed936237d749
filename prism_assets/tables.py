"""The registry: what assets there are, and what tables they publish. A new asset is its file and its entry here.

Everything that is true of a table or of an asset is defined once, in this module: the schema that the catalogue
promises, the scope that its heads are kept under, the asset that shows it, what of it `prism gc` may collect, which
rows name other artefacts, which settings it reads, which job, step and condition make it. Plain data: no Dagster, no
lake. Longer than other modules, because it is one list.
"""

from typing import TYPE_CHECKING

from prism_assets.entries import Asset, Command, Needs, Partitions, Table

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "ASSETS",
    "JOBS",
    "METRICS",
    "Asset",
    "Command",
    "Needs",
    "Partitions",
    "Table",
    "asset_named",
    "register",
    "schema_of",
    "table_named",
    "tables",
]

_TEXT, _TEXTS, _WHOLE, _NUMBER, _NUMBERS = "VARCHAR", "VARCHAR[]", "BIGINT", "DOUBLE", "DOUBLE[]"
_TOKENS = {"input_ids": "INTEGER[]", "loss_mask": "BOOLEAN[]"}
_RECORDS = {
    **{"id": _TEXT, "line": _WHOLE, "record_id": _TEXT, "source": _TEXT, "prompt": _TEXT, "completion": _TEXT},
    **{"messages": _TEXT, "rejected": _TEXT, "group": _TEXT, "answers": _TEXTS},
    **_TOKENS,
    **{"tokens": "INTEGER", "completion_tokens": "INTEGER"},
}
_RANKED = {
    **{"rank": _WHOLE, "score": "FLOAT", "id": _TEXT, "shard": _TEXT, "row": _WHOLE, "source": _TEXT},
    **{"record_id": _TEXT, "prompt": _TEXT, "completion": _TEXT, "messages": _TEXT},
    **{"completion_tokens": "INTEGER"},
    **_TOKENS,
}
_REJECTS = {"line": _WHOLE, "field": _TEXT, "reason": _TEXT, "excerpt": _TEXT}
# `fields` is the JSON text of what a record holds beside its conversation; a row for each candidate row, in order.
_FIELDS = {"id": _TEXT, "line": _WHOLE, "fields": _TEXT}
# What an adapter is judged by on held-out records.
METRICS = (
    *("target_preference", "mean_log_prob", "exact_match", "pair_accuracy", "margin"),
    *("unwanted_avoided", "choice_accuracy"),
)

# What the trials of an experiment share with everything else.
_SHARED: tuple[Command, ...] = ("run", "select", "experiment")
_SELECTING: tuple[Command, ...] = ("run", "select")

ASSETS: list[Asset] = [
    Asset(
        "base_model",
        "prism_assets.reference.base_model",
        (Table("base_model", 1),),
        condition="when_missing",
        reads=("model",),
        job="refresh_pool",
        step="Base model",
        commands=_SHARED,
    ),
    Asset(
        "candidates",
        "prism_assets.corpus.candidates",
        (
            Table("candidates", 1, "corpus", _RECORDS, by_shard=True),
            Table("rejects", 1, "corpus", _REJECTS, by_shard=True),
            Table("candidate_fields", 1, "corpus", _FIELDS, by_shard=True),
        ),
        partitions="shard",
        condition="when_missing",
        reads=("tokenization",),
        job="refresh_shards",
        pending="pending_candidates",
        step="Candidates",
        commands=_SHARED,
    ),
    Asset(
        "targets",
        "prism_assets.corpus.targets",
        (
            Table("targets", 4, "corpus", on_cards=True),
            Table("targets_rejects", 2, "corpus", _REJECTS),
            Table("eval_examples", 4, "corpus"),
            Table("eval_examples_rejects", 2, "corpus", _REJECTS),
        ),
        partitions="target",
        condition="when_missing",
        reads=("tokenization", "preference"),
        job="refresh_targets",
        # The pool keeps the records of every target out of every ranking.
        of_all_targets=True,
        step="Targets",
        commands=_SHARED,
    ),
    Asset(
        "live_pool",
        "prism_assets.corpus.live_pool",
        (
            Table(
                "live_pool",
                1,
                "corpus",
                {
                    **{"shard": _TEXT, "candidates_fingerprint": _TEXT, "rows": _WHOLE, "canonical_rows": _WHOLE},
                    **{"completion_tokens": _WHOLE, "excluded_rows": "INTEGER[]", "excluded_reasons": _TEXTS},
                },
                rows_name={"candidates_fingerprint": "candidates"},
                lists_shards=True,
                on_cards=True,
            ),
        ),
        condition="follow_arrivals",
        needs=Needs("candidates"),
        job="refresh_pool",
        step="Live pool and warm-up",
        commands=_SHARED,
    ),
    Asset(
        "warmup_sample",
        "prism_assets.reference.warmup_sample",
        (Table("warmup_sample", 1, "warmup", on_cards=True),),
        condition="follow",
        reads=("warmup", "lora", "model"),
        job="refresh_pool",
        step="Live pool and warm-up",
        commands=_SHARED,
    ),
    Asset(
        "warmup_checkpoints",
        "prism_assets.reference.warmup_checkpoints",
        (Table("warmup_checkpoints", 2, "warmup", on_cards=True),),
        condition="follow",
        reads=("warmup", "lora", "model"),
        job="refresh_pool",
        step="Live pool and warm-up",
        commands=_SHARED,
    ),
    Asset(
        "target_anchors",
        "prism_assets.features.target_anchors",
        (Table("target_anchors", 1, "warmup", on_cards=True),),
        partitions="target",
        condition="follow",
        reads=("targets", "tokenization", "evaluation", "model"),
        job="refresh_targets",
        step="Target directions",
        commands=_SELECTING,
    ),
    Asset(
        "target_features",
        "prism_assets.features.target_features",
        (Table("target_features", 1, "features", on_cards=True),),
        partitions="target",
        condition="follow",
        reads=("features", "model"),
        job="refresh_targets",
        step="Target directions",
        commands=_SELECTING,
    ),
    Asset(
        "target_direction",
        "prism_assets.selection.target_direction",
        (
            Table("target_directions", 2, "features", on_cards=True),
            Table(
                "target_weights",
                2,
                "features",
                {
                    **{"id": _TEXT, "group": _TEXT, "prompt": _TEXT, "completion": _TEXT, "score": _NUMBER},
                    **{"preference": _NUMBER, "gradient_norm": _NUMBER, "prism": _NUMBER, "uniform": _NUMBER},
                },
            ),
            Table("warmup_sample_features", 1, "features"),
        ),
        partitions="target",
        condition="follow",
        reads=("preference", "curvature", "strategies"),
        job="refresh_targets",
        step="Target directions",
        commands=_SELECTING,
    ),
    Asset(
        "candidate_features",
        "prism_assets.features.candidate_features",
        (
            Table(
                "candidate_features",
                1,
                "features",
                {"block": _TEXT, "block_content_hash": _TEXT, "rows": _WHOLE, "refused": _WHOLE},
                rows_name={"block": "feature_blocks"},
                by_shard=True,
            ),
            Table(
                "feature_blocks",
                1,
                "features",
                {
                    **{"id": _TEXT, "vector": "FLOAT[]", "norm": _NUMBERS, "gradient_norm": _NUMBERS},
                    **{"mean_log_prob": _NUMBERS, "refused": _TEXT},
                },
                heads_follow=True,
                parts_of="candidate_features",
            ),
        ),
        partitions="shard",
        condition="follow",
        reads=("features", "model"),
        job="refresh_shards",
        pending="pending_features",
        step="Candidate features",
        commands=_SHARED,
    ),
    Asset(
        "candidate_index",
        "prism_assets.features.candidate_index",
        (
            Table(
                "candidate_index",
                1,
                "features",
                rows_name={"segment": "index_segments", "features": "candidate_features"},
                lists_shards=True,
                on_cards=True,
            ),
            Table("index_segments", 1, "features"),
        ),
        condition="follow_arrivals",
        needs=Needs("candidate_features", asked_for=True),
        job="refresh_pool",
        step="Index",
        commands=_SHARED,
    ),
    Asset(
        "selection",
        "prism_assets.selection.selection",
        (
            Table("selection", 2, columns=_RANKED, last_stays=True),
            Table("removed", 1, columns={**_RANKED, "reason": _TEXT}, last_stays=True),
            Table("hidden_states", 1),
        ),
        partitions="target_strategy",
        condition="follow_arrivals",
        # Made from the pool that the index shows, and again later.
        needs=Needs(),
        reads=("selection", "preference", "model"),
        job="refresh_selections",
        step="Selection",
        commands=_SELECTING,
    ),
    Asset(
        "adapter",
        "prism_assets.training.adapter",
        (Table("adapters", 2),),
        partitions="target_strategy",
        condition="follow_selections",
        fine_tunes=True,
        reads=("training", "seeds", "lora", "model"),
        job="refresh_selections",
        step="Fine-tuning, evaluation",
    ),
    Asset(
        "evaluation",
        "prism_assets.evaluation.evaluation",
        (
            Table(
                "evaluations",
                3,
                columns={
                    **{"id": _TEXT, "mean_log_prob": _NUMBER, "margin": _NUMBER, "prediction": _TEXT},
                    **{"exact_match": "BOOLEAN", "unwanted_answer": "BOOLEAN", "choice_correct": "BOOLEAN"},
                },
            ),
            Table(
                "benchmarks",
                1,
                columns={
                    **{
                        "task": _TEXT,
                        "metric": _TEXT,
                        "filter": _TEXT,
                        "value": _NUMBER,
                        "higher_is_better": "BOOLEAN",
                    },
                    **{"documents": _WHOLE, "shots": _WHOLE, "task_version": _TEXT, "asked": "BOOLEAN"},
                },
            ),
        ),
        partitions="target_strategy",
        condition="follow",
        fine_tunes=True,
        reads=("evaluation", "seeds", "model"),
        job="refresh_selections",
        step="Fine-tuning, evaluation",
    ),
    Asset(
        "report",
        "prism_assets.report.report",
        (Table("report", 3),),
        partitions="target",
        condition="follow_evaluations",
        reads=("strategies", "seeds"),
        job="refresh_targets",
        step="Report",
    ),
    # Short fine-tunings and hundreds of forward passes a target: started manually or by the weekly schedule, not at
    # each arrival.
    Asset(
        "trust",
        "prism_assets.trust.trust",
        (Table("trust", 2, "features"),),
        partitions="target",
        reads=("trust", "preference", "training", "features", "model"),
        job="check_trust",
        step="Trust",
        commands=("trust",),
    ),
    # Many times the fine-tuning of everything else.
    Asset(
        "experiment_trials",
        "prism_assets.experiment.experiment_trials",
        (
            Table(
                "trials",
                1,
                "features",
                {
                    **{"target": _TEXT, "strategy": _TEXT, "split": _WHOLE, "seed": _WHOLE},
                    **{f"{of}{metric}": _NUMBER for of in ("", "base_") for metric in METRICS},
                    **{"selected_rows": _WHOLE, "completion_tokens": _WHOLE},
                },
            ),
        ),
        partitions="target",
        reads=(
            *("experiment", "strategies", "seeds", "model", "lora", "features", "preference", "selection", "training"),
            "evaluation",
        ),
        job="run_experiment",
        step="Experiment",
        commands=("experiment",),
    ),
    Asset(
        "experiment",
        "prism_assets.experiment.experiment",
        (
            Table(
                "experiments",
                2,
                "features",
                {
                    **{"target": _TEXT, "strategy": _TEXT, "other": _TEXT, "metric": _TEXT, "mean": _NUMBER},
                    **{"std": _NUMBER, "low": _NUMBER, "high": _NUMBER, "units": _WHOLE, "unit": _TEXT},
                },
            ),
        ),
        partitions="target",
        reads=("experiment", "strategies", "seeds"),
        job="run_experiment",
        step="Experiment",
        commands=("experiment",),
    ),
]

# Dagster runs no two partitions definitions in one job, so there is one for each, and one for what is made on demand.
JOBS: dict[str, str] = {
    "refresh_pool": "Everything that is one for the whole pool: manifest, warm-up, index.",
    "refresh_shards": "Rows and gradient features of inbox files.",
    "refresh_targets": "Everything that is one per target.",
    "refresh_selections": "Selection, fine-tuning and evaluation of targets and strategies.",
    "check_trust": "Whether the weights, the directions and the scores of targets hold, measured. Costly, and never "
    "automatic.",
    # Not `experiment`: a job may not be called as an asset is.
    "run_experiment": "Every strategy over several splits and seeds, and their paired differences. Never started "
    "automatically.",
}


def register(asset: Asset) -> None:
    """Add an asset of your own, before definitions are built. Raises ValueError for a name that is taken."""
    taken = {one.name for one in ASSETS} | {table.name for table in tables()}
    for name in (asset.name, *(table.name for table in asset.tables)):
        if name in taken:
            raise ValueError(f"there is an asset or a table called {name!r} already")
    ASSETS.append(asset)


def asset_named(name: str) -> Asset:
    """The entry of an asset. Raises KeyError where there is none."""
    found = next((one for one in ASSETS if one.name == name), None)
    if found is None:
        raise KeyError(f"no asset is called {name!r}; there are {', '.join(one.name for one in ASSETS)}")
    return found


def table_named(name: str) -> Table | None:
    """The entry of a table, None for a table that is not registered."""
    return next((table for one in ASSETS for table in one.tables if table.name == name), None)


def schema_of(name: str) -> "pa.Schema":
    """The columns of a table as Arrow types. Raises KeyError for a table that the registry lacks, else as
    `Table.schema`."""
    entry = table_named(name)
    if entry is None:
        raise KeyError(f"the registry (prism_assets/tables.py) has no table {name!r}")
    return entry.schema()


def tables() -> list[Table]:
    """All tables, in the order of their assets."""
    return [table for one in ASSETS for table in one.tables]
