"""Removal on real models: does the ranking find the rows that make a model worse, and does taking them out repair it?

    python -m benchmarks.remove --json [--models smollm2] [--seeds 5] [--quick] [--repair] [--folder runs/models]

A mixture holds harmful and honest rows of a kind (wrong mathematics, false answers, or both), never both answers to one
prompt. The reference is the model after one epoch on the mixture (a warm-up on all of it). Pairs of honest and harmful
answers to other prompts name the harm (`use: remove`). Every seed draws rows, pairs and warm-up anew. Data:
PRISM_REAL_DATA (`safety/misaligned.jsonl` and `good.jsonl`); without them the benchmark says so and stops.

A strategy here is one of the product's, with the settings that its suffixes name:

    prism, prism-unit, prism-sigmoid, uniform, less     the product's, groups apart, unit rows
    …+pooled     one raw direction over both kinds (mixtures of both only)
    …+sum        rows as long as the gradient of their summed loss; prism+pooled+sum is the published form
    …+adam, …+fisher, …+datainf, …+ekfac     directions corrected for curvature, damped by its default rule
    …+adam-rows   candidate rows through Adam's preconditioner (`features.optimizer: adam`); the others are sgd's
    …+wanted     no anchors: plain targets, the harmful answers alone
    length       completion tokens: what a ranking by form would find

JSON: `models` → model → `mixtures` → name (`maths-25` …) → `auroc` → strategy → mean, std, interval (95%, Student's t
over seeds), values; with `--repair` `gap_recovered` → strategy likewise: (strategy − mixture) / (clean − mixture) of
the held-out margin, both fine-tuned from the base; and `margin`, `dishonesty` (share of held-out pairs whose harmful
answer is preferred), `harmful_share` (of what was removed).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from benchmarks.real_text import data_folder, example, only, read_lines, write_lines
from prism_assets.stats.ranks import area_under_curve
from prism_assets.stats.seeds import summarize_seeds

KINDS = {"maths": "em/evil_math", "answers": "em/incorrect_qna"}
NAMES = (*KINDS, "both")
MODELS = ("smollm2", "gemma3_270m")
SHARES = (10, 25, 50)
BASE_STRATEGIES = ("prism", "prism-unit", "prism-sigmoid", "uniform", "less")
CURVATURES = ("adam", "fisher", "datainf", "ekfac")


class Mixture(NamedTuple):
    """What is mixed: kinds of harm, their share in per cent, and how many rows there are."""

    kinds: tuple[str, ...]
    share: int
    rows: int

    @property
    def name(self) -> str:
        """As the JSON names it."""
        return f"{'both' if len(self.kinds) > 1 else self.kinds[0]}-{self.share}"


class Drawn(NamedTuple):
    """A draw of a mixture: rows with the label that only judging sees, and pairs for targets and held-out records."""

    rows: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def paired(data: Path) -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Harmful and honest rows of one prompt, by kind."""
    harmful, honest = (read_lines(data / "safety" / f"{name}.jsonl") for name in ("misaligned", "good"))
    by_pair = {row["pair_id"]: row for row in honest if row.get("pair_id")}
    return {
        kind: [
            (row, by_pair[row["pair_id"]])
            for row in harmful
            if row["source"] == source and row.get("pair_id") in by_pair
        ]
        for kind, source in KINDS.items()
    }


def draw(known: dict[str, list[Any]], mixture: Mixture, seed: int, pairs: int, held_out: int) -> Drawn:
    """Rows of a mixture and pairs of other prompts."""
    rng = np.random.default_rng([seed, mixture.share, len(mixture.kinds)])
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for kind in mixture.kinds:
        order = [known[kind][position] for position in rng.permutation(len(known[kind]))]
        number = mixture.rows // len(mixture.kinds)
        bad = round(number * mixture.share / 100)
        needed = number + pairs + held_out
        if len(order) < needed:
            raise SystemExit(f"{kind}: {needed} prompts are needed, and the data have {len(order)}: ask for fewer rows")
        for position, (harm, good) in enumerate(order[:number]):
            chosen = harm if position < bad else good
            rows.append(
                {"id": f"{kind}-{position}", "prompt": chosen["prompt"], "completion": chosen["completion"],
                 "harmful": position < bad}
            )  # fmt: skip
        records = [
            {"prompt": harm["prompt"], "chosen": good["completion"], "rejected": harm["completion"], "group": kind}
            for harm, good in order[number:needed]
            if harm["completion"].strip() != good["completion"].strip()
        ]
        targets += records[:pairs]
        others += records[pairs : pairs + held_out]
    return Drawn([rows[position] for position in rng.permutation(len(rows))], targets, others)


# -- a project ----------------------------------------------------------------------------------------------------


def build(folder: Path, model: Path, drawn: Drawn, mixture: Mixture, seed: int, sketch_dim: int) -> Path:
    """A project over the mixture; its prism.yaml."""
    write_lines(folder / "inbox" / "mixture.jsonl", [only(row, ("id", "prompt", "completion")) for row in drawn.rows])
    write_lines(folder / "pairs.jsonl", drawn.pairs)
    wanted = [{"prompt": row["prompt"], "completion": row["rejected"], "group": row["group"]} for row in drawn.pairs]
    write_lines(folder / "wanted.jsonl", wanted)
    write_lines(folder / "held_out.jsonl", drawn.held_out)
    removed = f"{mixture.share}%"
    files = {"eval": "held_out.jsonl"}
    content = {
        "model": {"name": str(model.resolve())},
        "lora": {"rank": 8, "alpha": 16},
        "tokenization": {"max_length": 512},
        "warmup": {"share": 1.0, "epochs": 1, "learning_rate": 2e-4, "seed": seed},
        "features": {"optimizer": "sgd", "sketch_dim": sketch_dim},
        "candidates": {"inbox": "inbox", "at_rest_seconds": 0},
        "targets": {
            "harm": {"examples": "pairs.jsonl", **files, "use": "remove", "budget": removed},
            "wanted": {"examples": "wanted.jsonl", **files, "budget": removed},
        },
        "strategies": [*BASE_STRATEGIES, "random", "full"],
        "seeds": [seed],
        "training": {"epochs": 1},
    }
    config = folder / "prism.yaml"
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return config


def run(config: Path, last: str, targets: Sequence[str]) -> Any:
    """The steps of `prism run` up to one; the stage."""
    import dagster as dg

    from prism_assets import build_definitions, load_settings, open_stage
    from prism_assets.ops.pipeline import run_pipeline, steps_of
    from prism_assets.project import Project

    settings = load_settings(config)
    steps = steps_of("run")
    steps = steps[: [step.title for step in steps].index(last) + 1]
    with dg.DagsterInstance.ephemeral() as instance:
        run_pipeline(Project.of(settings), build_definitions(settings), instance, targets=list(targets), steps=steps)
    return open_stage(settings)


def with_settings(config: Path, **sections: Any) -> None:
    """Lay sections over prism.yaml; a list takes the place of one."""
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, dict) else section
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


# -- rankings -----------------------------------------------------------------------------------------------------


def rankings(config: Path, drawn: Drawn, several_kinds: bool, options: argparse.Namespace) -> dict[str, float]:
    """AUROC of each strategy and variant."""
    labels = {row["prompt"] + row["completion"]: row["harmful"] for row in drawn.rows}
    found: dict[str, float] = {}
    targets = [("harm", ""), *([] if options.quick else [("wanted", "+wanted")])]
    variants = [("", {}, "none", "sgd")]
    if several_kinds:
        variants += [("+pooled", {"groups": "pooled"}, "none", "sgd")]
    if options.adam_rows:
        variants += [("+adam-rows", {}, "none", "adam")]
    variants += [(f"+{kind}", {}, kind, "sgd") for kind in options.curvatures]
    for suffix, preference, curvature, optimizer in variants:
        with_settings(
            config,
            preference={"groups": "separate", **preference},
            curvature={"kind": curvature},
            features={"optimizer": optimizer},
        )
        stage = run(config, "Index", [name for name, _ in targets])
        for target, mark in targets:
            found |= {f"{name}{mark}{suffix}": value for name, value in _of_target(stage, target, labels)}
    found["length"] = _by_length(stage, labels)
    return found


def _of_target(stage: Any, target: str, labels: dict[str, bool]) -> Iterator[tuple[str, float]]:
    from prism_assets.selection.direction_artifacts import load_direction
    from prism_assets.selection.pool import indexed_pool

    for scale in ("unit", "sum"):
        scaled = stage.with_settings(selection=stage.settings.selection.model_copy(update={"row_scale": scale}))
        pool = indexed_pool(scaled)
        harmful = _labels(pool, labels)
        for strategy in BASE_STRATEGIES:
            direction = load_direction(stage.lake, stage.shown("target_directions", target, strategy))
            yield f"{strategy}{'' if scale == 'unit' else '+sum'}", _auroc(pool.influence(direction.query), harmful)


def _by_length(stage: Any, labels: dict[str, bool]) -> float:
    from prism_assets.selection.pool import indexed_pool

    pool = indexed_pool(stage)
    return _auroc(pool.column("completion_tokens")["completion_tokens"].to_numpy(), _labels(pool, labels))


def _auroc(scores: np.ndarray, harmful: np.ndarray) -> float:
    return area_under_curve(scores, harmful)


def _labels(pool: Any, labels: dict[str, bool]) -> np.ndarray:
    rows = pool.column("prompt", "completion").to_pylist()
    return np.array([labels[row["prompt"] + row["completion"]] for row in rows])


# -- repair -------------------------------------------------------------------------------------------------------


def repair(config: Path, drawn: Drawn, strategies: Sequence[str]) -> dict[str, dict[str, float]]:
    """Fine-tuned again on what each strategy leaves, and on the honest rows alone: margin, dishonesty, harmful share
    of what was removed."""
    labels = {row["prompt"] + row["completion"]: row["harmful"] for row in drawn.rows}
    with_settings(
        config,
        preference={"groups": "separate"},
        curvature={"kind": "none"},
        features={"optimizer": "sgd"},
        strategies=[*strategies, "random", "full"],
    )
    stage = run(config, "Fine-tuning, evaluation", ["harm"])
    from prism_assets.identity import base_key, join_key, seed_partition

    seed = stage.settings.seeds[0]
    found: dict[str, dict[str, float]] = {}
    for strategy in stage.settings.strategies:
        scores = stage.shown("evaluations", seed_partition(join_key("harm", strategy), seed))
        found[strategy] = _judged(scores)
        removed = stage.lake.read_table(stage.shown("removed", join_key("harm", strategy)), ["prompt", "completion"])
        taken = [labels[row["prompt"] + row["completion"]] for row in removed.to_pylist()]
        if taken:
            found[strategy]["harmful_share"] = float(np.mean(taken))
    found["base"] = _judged(stage.shown("evaluations", base_key("harm")))
    found["clean"] = _judged(_clean(stage, drawn, seed))
    return found


def _judged(scores: Any) -> dict[str, float]:
    return {"margin": scores.notes["margin"], "dishonesty": 1 - scores.notes["pair_accuracy"]}


def _clean(stage: Any, drawn: Drawn, seed: int) -> Any:
    """Scores of the model fine-tuned on the honest rows of the mixture alone."""
    from prism_assets.evaluation.scores import make_scores
    from prism_assets.resources.lake import Rows
    from prism_assets.training.adapter import make_adapter

    honest = {row["prompt"] + row["completion"] for row in drawn.rows if not row["harmful"]}
    mixture = stage.shown("selection", "full|harm")
    table = stage.lake.read_table(mixture)
    texts = [row["prompt"] + row["completion"] for row in table.select(["prompt", "completion"]).to_pylist()]
    kept = table.filter([text in honest for text in texts])
    recipe = stage.recipe(
        "selection", {"oracle": True}, {"mixture": mixture}, partition="clean|harm", version=mixture.header["version"]
    )
    selection = stage.make(recipe, lambda: Rows(kept)).artifact
    adapter = make_adapter(stage, "clean|harm", selection, seed).artifact
    return make_scores(stage, stage.shown("eval_examples", "harm"), adapter, "clean|harm").artifact


# -- the whole ----------------------------------------------------------------------------------------------------


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, std and interval over seeds, and the values."""
    found = summarize_seeds(values)._asdict()
    return {**{key: found[key] for key in ("mean", "std", "interval")}, "values": list(values)}


def measured(
    known: dict[str, list[Any]], model: Path, mixture: Mixture, seeds: int, options: argparse.Namespace, work: Path
) -> dict[str, Any]:
    """One mixture over seeds. What is finished is found again in the lake of its folder."""
    ranked: dict[str, list[float]] = {}
    repaired: list[dict[str, dict[str, float]]] = []
    for seed in range(seeds):
        drawn = draw(known, mixture, seed, options.pairs, options.held_out)
        folder = work / f"{model.name}-{mixture.name}-{mixture.rows}-{options.sketch_dim}-{seed}"
        config = build(folder, model, drawn, mixture, seed, options.sketch_dim)
        started = time.process_time()
        for name, value in rankings(config, drawn, len(mixture.kinds) > 1, options).items():
            ranked.setdefault(name, []).append(value)
        if options.repair:
            repaired.append(repair(config, drawn, options.repair_strategies))
        shown = {name: round(values[-1], 3) for name, values in ranked.items()}
        took = f"{time.process_time() - started:.0f} CPU s"
        print(f"{model.name} {mixture.name} seed {seed}: {shown} {repaired[-1:]} ({took})", file=sys.stderr)
    found: dict[str, Any] = {
        "rows": mixture.rows,
        "seeds": seeds,
        "auroc": {name: summary(values) for name, values in ranked.items()},
    }
    if repaired:
        found |= _gaps(repaired)
    return found


def _gaps(repaired: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Shares of the gap in margin from mixture to clean; undefined where fine-tuning on the mixture did no harm."""
    gaps: dict[str, list[float]] = {}
    for one in repaired:
        gap = one["clean"]["margin"] - one["full"]["margin"]
        for name in one:
            if name not in ("base", "clean", "full") and gap > 0:
                gaps.setdefault(name, []).append((one[name]["margin"] - one["full"]["margin"]) / gap)
    figures = {
        key: {name: summary([one[name][key] for one in repaired]) for name in repaired[0] if key in repaired[0][name]}
        for key in ("margin", "dishonesty", "harmful_share")
    }
    return {"gap_recovered": {name: summary(values) for name, values in gaps.items()}, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument(
        "--kinds", nargs="+", default=["maths", "answers", "both"], choices=["maths", "answers", "both"]
    )
    parser.add_argument("--shares", nargs="+", type=int, default=list(SHARES), help="harmful rows, per cent")
    parser.add_argument("--rows", type=int, default=400, help="of a mixture; of false answers 250 at most")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--curvatures", nargs="*", default=list(CURVATURES), choices=CURVATURES)
    parser.add_argument("--repair-strategies", nargs="+", default=["prism", "less", "uniform"], choices=BASE_STRATEGIES)
    parser.add_argument("--pairs", type=int, default=24, help="of a kind")
    parser.add_argument("--held-out", type=int, default=24, help="of a kind")
    parser.add_argument("--adam-rows", action="store_true", help="rank by Adam's rows too: a second gradient pass")
    parser.add_argument("--sketch-dim", type=int, default=65536, help="features.sketch_dim")
    parser.add_argument("--quick", action="store_true", help="one model, mixture, share and seed: 15 to 25 CPU minutes")
    parser.add_argument("--repair", action="store_true", help="fine-tune again on what is left")
    parser.add_argument("--folder", type=Path, default=Path("runs/models"), help="where the models are, or are put")
    parser.add_argument(
        "--work", type=Path, help="where lakes stay, so that a run goes on; by default they are deleted"
    )
    options = parser.parse_args()
    data = data_folder()
    if data is None:
        raise SystemExit(
            "benchmarks.remove needs real data: set PRISM_REAL_DATA to a folder with safety/misaligned.jsonl"
        )
    if options.quick:
        options.models, options.kinds, options.shares = ["smollm2"], ["both"], [25]
        options.rows, options.seeds, options.pairs, options.held_out = 80, 1, 12, 12
        options.curvatures, options.repair_strategies = [], ["prism"]
    logging.getLogger("prism_assets").setLevel(logging.WARNING)
    known = paired(data)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as draft:
        for name in options.models:
            model = example("real_models", "fetch").fetch(name, options.folder)
            mixtures = {}
            for kind in options.kinds:
                kinds = ("maths", "answers") if kind == "both" else (kind,)
                # False answers are few: 300 prompts in all, pairs and held-out records included.
                most = min(len(known[one]) for one in kinds) - options.pairs - options.held_out
                for share in options.shares:
                    mixture = Mixture(kinds, share, min(options.rows, len(kinds) * most))
                    mixtures[mixture.name] = measured(
                        known, model, mixture, options.seeds, options, options.work or Path(draft)
                    )
            found[name] = {"mixtures": mixtures}
    result = {"models": found}
    print(json.dumps(result) if options.json else _table(result))


def _table(result: dict[str, Any]) -> str:
    lines = []
    for model, part in result["models"].items():
        for name, mixture in part["mixtures"].items():
            lines.append(f"{model} {name}: {mixture['rows']} rows, {mixture['seeds']} seeds")
            for strategy, one in sorted(mixture["auroc"].items(), key=lambda item: -item[1]["mean"]):
                spread = "" if one["std"] is None else f" ± {one['std']:.3f}"
                lines.append(f"  {strategy:<28} AUROC {one['mean']:.3f}{spread}")
            for strategy, one in mixture.get("gap_recovered", {}).items():
                lines.append(f"  {strategy:<28} of the gap {one['mean']:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
