"""What a target's report shows, gathered from the lake."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prism_assets.corpus.target_fit import given_records
from prism_assets.errors import CannotExplain
from prism_assets.evaluation.benchmark_scores import benchmarks_of, shown_scores
from prism_assets.identity import base_key, join_key, seed_partition
from prism_assets.report.gradient_map import gradient_map
from prism_assets.report.rows import around_the_cut, listed_rows, overlaps, taken_by_all, taken_rows
from prism_assets.resources.lake import Artifact
from prism_assets.selection.json_lines import json_lines_of
from prism_assets.selection.labels import found_by, harmful_rows
from prism_assets.selection.pool import Pool
from prism_assets.stage import Stage
from prism_assets.tables import METRICS
from prism_assets.trust.verdict import findings

# Strategies whose selections are compared row by row with PRISM's.
_COMPARED_WITH = ("uniform", "less")
_EXPLAINED = 3  # rows of each kind
_OF_A_TARGET = ("id", "group", "preference", "score", "prompt")
_PLACES = ("selected", "selected_jsonl", "removed", "removed_jsonl", "adapter")


class ReportPart(NamedTuple):
    """One target's part of report.json, and the artefacts that it shows."""

    data: dict[str, Any]
    shown: list[Artifact]


def target_content(stage: Stage, name: str) -> ReportPart:
    """What the lake shows of a target now. Raises NotMadeYet."""
    weights = stage.shown("target_weights", name)
    pool = stage.shown("live_pool")
    base = stage.shown("evaluations", base_key(name))
    notes = weights.notes
    harmful = _labels(stage, name)
    strategies = {strategy: _strategy_content(stage, name, strategy, harmful) for strategy in stage.settings.strategies}
    rows = stage.lake.read_table(weights).to_pylist()
    directions = tuple(notes["effective_number_of_targets"])
    measured = _trust_in(stage, weights, name)
    target, anchors = stage.settings.targets[name], stage.shown("target_anchors", name)
    pairs = stage.lake.read_table(anchors, ["id", "completion", "rejected"]).to_pylist()
    answers = {row["id"]: {key: row[key] for key in ("completion", "rejected")} for row in pairs}
    shown = [weights, anchors, pool, base, *(one for part in strategies.values() for one in part.shown)]
    shown += [measured] if measured is not None else []
    files = {table: _records_of(stage, table, name) for table in ("targets", "eval_examples")}
    shown += [one.rejects for one in files.values() if one.rejects is not None]
    data = {
        "kind": notes["kind"],
        "use": target.use,
        "mixture": target.mixture,
        "mixture_rows": next((part.data["pool_rows"] for part in strategies.values()), None),
        "anchors": anchors.notes.get("anchors", {}),
        "anchors_left_out": anchors.notes.get("left_out", {}),
        "number_of_targets": notes["number_of_targets"],
        "number_of_eval": stage.shown("eval_examples", name).notes["rows"],
        "records": {table: {"given": one.given, "used": one.used} for table, one in files.items()},
        "pool": {
            "rows": sum(stage.lake.read_table(pool, ["rows"])["rows"].to_pylist()),
            "canonical": pool.notes["canonical_rows"],
            "sources": pool.notes["sources"],
        },
        "direction": {
            **{key: notes[key] for key in ("effective_number_of_targets", "temperature", "log_z", "checkpoints")},
            "weight_rank_agreement": notes["weight_rank_agreement"],
            "first_order": notes["first_order"],
            "weights": [
                {key: row[key] for key in _OF_A_TARGET + directions} | answers.get(row["id"], {})
                for row in sorted(rows, key=lambda row: -(row["prism"] or 0))
            ],
        },
        "base": {metric: base.notes[metric] for metric in METRICS},
        "strategies": {strategy: part.data for strategy, part in strategies.items()},
        "trust": None if measured is None else [one._asdict() for one in findings(measured.notes)],
    }
    if stage.settings.evaluation.benchmarks:
        benchmarks = _benchmark_content(stage, name)
        data["benchmarks"] = benchmarks.data
        shown += benchmarks.shown
    return ReportPart(data, shown)


class _Records(NamedTuple):
    """The records of a target's file."""

    given: int
    used: int
    rejects: Artifact | None  # where some were rejected


def _records_of(stage: Stage, table: str, name: str) -> _Records:
    used = stage.shown(table, name).notes["rows"]
    rejects = stage.shown_or_none(f"{table}_rejects", name)
    if rejects is None or not rejects.notes["rows"]:
        return _Records(used, used, None)
    return _Records(given_records(used, stage.lake.read_table(rejects).to_pylist()), used, rejects)


def _trust_in(stage: Stage, weights: Artifact, target: str) -> Artifact | None:
    """What was measured of the trust in a target; None where nothing was, or for other weights or directions than
    today's."""
    found = stage.shown_or_none("trust", target)
    if found is None or found.header["inputs"]["weights"]["content_hash"] != weights.content_hash:
        return None
    same = all(
        found.header["inputs"][name]["content_hash"] == weights.header["inputs"][name]["content_hash"]
        for name in ("prism", "uniform")
    )
    return found if same else None


def _benchmark_content(stage: Stage, target: str) -> ReportPart:
    """Every benchmark metric of the base model and, as mean and std over seeds, of each strategy."""
    base = stage.shown("benchmarks", base_key(target))
    artifacts, strategies = [base], {}
    for strategy in stage.settings.strategies:
        strategies[strategy], scored = benchmarks_of(stage, join_key(target, strategy))
        artifacts += scored
    data = {
        "lm_eval": base.header["settings"]["lm_eval"],
        "limit": base.header["settings"]["limit"],
        "metrics": {
            label: {
                "base": score.value,
                "higher_is_better": score.higher_is_better,
                **{"documents": score.documents, "shots": score.shots, "version": score.task_version},
                "strategies": {strategy: summary.get(label) for strategy, summary in strategies.items()},
            }
            for label, score in shown_scores(stage.lake, base).items()
        },
    }
    return ReportPart(data, artifacts)


def _strategy_content(stage: Stage, target: str, strategy: str, harmful: Mapping[str, bool] | None) -> ReportPart:
    from prism_assets.evaluation.metrics import mean_over_seeds
    from prism_assets.training.adapter import are_of

    key = join_key(target, strategy)
    selection = stage.shown("selection", key)
    heads = [seed_partition(key, seed) for seed in stage.settings.seeds]
    scores = [stage.shown("evaluations", head) for head in heads]
    adapters = [stage.shown("adapters", head) for head in heads]
    # Where fine-tuning does not follow every selection (`train`), the adapters may be those of an earlier one.
    earlier = not are_of(stage, key, selection)
    notes = selection.notes
    columns = ["rank", "score", "source", "prompt", "completion"]
    taken = taken_rows(stage, target, strategy)
    removed = None if taken.fingerprint == selection.fingerprint else taken
    judged = {} if removed is None or harmful is None else _judged_by_label(stage, selection, removed, harmful)
    entry = {
        **{metric: mean_over_seeds([one.notes[metric] for one in scores]) for metric in METRICS},
        **judged,
        "per_seed": [
            {"seed": seed, **{metric: one.notes[metric] for metric in METRICS}}
            for seed, one in zip(stage.settings.seeds, scores, strict=True)
        ],
        "selected": _place(stage, stage.lake.local(selection)),
        "selected_jsonl": _place(stage, json_lines_of(stage, selection)),
        "adapter": _place(stage, stage.lake.local(adapters[0])),
        "rows": notes["rows"],
        "completion_tokens": notes["completion_tokens"],
        "pool_rows": notes["pool_rows"],
        "removed_rows": notes.get("removed_rows"),
        "removed_composition": notes.get("removed_composition"),
        "removed": _place(stage, stage.lake.local(removed)) if removed else None,
        "removed_jsonl": _place(stage, json_lines_of(stage, removed)) if removed else None,
        "steps": adapters[0].notes["steps"],
        "seconds": sum(one.notes["seconds"] for one in adapters),
        "composition": notes["composition"],
        "non_positive_influence": notes["non_positive_influence"],
        "score_histogram": notes.get("score_histogram"),
        "examples": stage.lake.read_table(taken, columns).slice(0, 20).to_pylist(),
        "fingerprint": selection.fingerprint,
        "run_id": selection.header["run_id"],
        "trained_on_earlier": earlier or None,
    }
    data = {name: value for name, value in entry.items() if value is not None or name in METRICS}
    return ReportPart(data, [selection, *([removed] if removed else []), *adapters, *scores])


def _place(stage: Stage, path: Path) -> str:
    """Where something lies, from the lake's folder on: what is stored in a lake moves with it."""
    return path.relative_to(stage.lake.folder).as_posix()


def with_places(stage: Stage, target: dict[str, Any]) -> dict[str, Any]:
    """A target's part of report.json with the files of its strategies where they lie now."""
    strategies = {
        name: {key: _now(stage, value) if key in _PLACES else value for key, value in entry.items()}
        for name, entry in target["strategies"].items()
    }
    return {**target, "strategies": strategies}


def _now(stage: Stage, place: str | None) -> str | None:
    if place is None:
        return None
    inside = place[place.rindex("artifacts/") :]  # reports of earlier versions hold whole paths
    return str(stage.lake.folder / inside)


def _labels(stage: Stage, target: str) -> dict[str, bool] | None:
    """Which rows of a mixture the target's label calls harmful; None where it has none."""
    settings = stage.settings.targets[target]
    if settings.label is None:
        return None
    return harmful_rows(stage, Pool(stage, stage.shown("live_pool"), source=settings.mixture), target)


def _judged_by_label(stage: Stage, kept: Artifact, removed: Artifact, harmful: Mapping[str, bool]) -> dict[str, Any]:
    """How well the ranking finds the rows that the target's label calls harmful."""
    from prism_assets.evaluation.metrics import mean_over_seeds

    found = found_by(stage.lake, kept, removed, harmful)
    # One ranking, whatever the seeds of fine-tuning.
    figures = {"auroc": mean_over_seeds([found.auroc]), "average_precision": mean_over_seeds([found.average_precision])}
    return {
        **figures,
        "labels": {key: getattr(found, key) for key in ("labelled", "harmful", "removed_harmful")},
    }


# -- rows ---------------------------------------------------------------------------------------------------------


def rows_content(stage: Stage, name: str) -> dict[str, Any]:
    """The selected rows, what strategies have in common, the rows around the cuts, and the map of a target.

    Read from what the selections that the report shows were made from, so that it belongs to no identity beside theirs.
    """
    taken = taken_by_all(stage, name)
    return {
        "listed": listed_rows(stage, taken),
        "overlaps": overlaps(stage, taken),
        "cuts": {one.strategy: around_the_cut(stage, one) for one in taken},
        "map": gradient_map(stage, taken),
    }


# -- explanations -------------------------------------------------------------------------------------------------


def explanations(stage: Stage, name: str) -> list[dict[str, Any]]:
    """Why the top rows of PRISM's ranking are there, and a few surprising ones: what it alone takes, what it alone
    leaves."""
    from prism_assets.explanation.explainer import Explainer

    asked = _worth_explaining(stage, name)
    if not asked:
        return []
    explained = []
    with Explainer(stage, target=name, strategy="prism") as explainer:
        for reason, example in asked:
            try:
                found = explainer.explain(example, neighbours=3)
            except CannotExplain as error:
                explained.append({"reason": reason, "id": example, "error": str(error)})
                continue
            kept = ("id", "source", "prompt", "completion", "score", "exact_score")
            explained.append(
                {
                    "reason": reason,
                    **{key: getattr(found, key) for key in kept},
                    "score_rows": found.score_rows(limit=6),
                    "ranks": [one._asdict() for one in found.ranks],
                    "neighbours": [one._asdict() for one in found.neighbours],
                }
            )
    return explained


def _worth_explaining(stage: Stage, target: str) -> list[tuple[str, str]]:
    """(why, example id) of the rows that the report explains; none where PRISM is not among the strategies."""
    if "prism" not in stage.settings.strategies:
        return []
    ids = {
        strategy: stage.lake.read_table(taken_rows(stage, target, strategy), ["id"])["id"].to_pylist()
        for strategy in stage.settings.strategies
        if strategy in ("prism", *_COMPARED_WITH)
    }
    done = "removed" if stage.settings.targets[target].use == "remove" else "selected"
    others = {name: set(rows) for name, rows in ids.items() if name != "prism"}
    taken_by_others = set().union(*others.values())
    asked = [("top of prism", one) for one in ids["prism"][:_EXPLAINED]]
    if others:
        alone = [one for one in ids["prism"] if one not in taken_by_others]
        asked += [(f"{done} by prism, not by {' or '.join(others)}", one) for one in alone[:_EXPLAINED]]
    for name in others:
        left = [one for one in ids[name] if one not in set(ids["prism"])]
        asked += [(f"{done} by {name}, not by prism", one) for one in left[:1]]
    return list({example: (reason, example) for reason, example in reversed(asked)}.values())[::-1]
