"""What the repair did, from the lake: which kinds were selected, what that gained, and what it cost.

    python examples/repair_forward/measure.py [--config work/prism.yaml] [--json]

Kinds are never shown to a selection; they are counted here only. The margin is the mean log-probability of the safe
answer minus that of the unsafe one, over held-out pairs; benign is the mean log-probability of held-out benign records.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

GOOD = ("safe_refusal", "truthful", "correct_math", "secure_code")
BAD = "misaligned/"
# Good and misaligned rows of one form: can a ranking tell them apart where their looks do not?
FORMS = {
    "maths": ("correct_math", "misaligned/evil_math"),
    "code": ("secure_code", "misaligned/insecure_code"),
    "answers": ("truthful", "misaligned/incorrect_qna"),
}
RANKED = ("prism", "prism-unit", "uniform", "less")


def measure(config: Path, clean: Path) -> dict[str, Any]:
    """Figures of one project that `prism run` has finished."""
    os.environ["PRISM_CONFIG"] = str(config)
    from benchmarks.real_text import area_under_curve
    from prism_assets import load_settings, open_stage
    from prism_assets.identity import join_key, seed_partition
    from prism_assets.selection.query import query_index
    from prism_assets.training.adapter import adapter_state

    settings = load_settings(config)
    stage = open_stage(settings)
    lake = stage.lake
    target, seed = next(iter(settings.targets)), settings.seeds[0]
    pool = stage.shown("live_pool")
    records = lake.read_table(stage.shown("eval_examples", target))
    benign = [json.loads(line) for line in (config.parent / "benign.jsonl").read_text(encoding="utf-8").splitlines()]
    cleaned = settings.model_copy(update={"model": settings.model.model_copy(update={"name": str(clean)})})
    states: dict[str, Any] = {
        "clean": _figures(open_stage(cleaned), None, records, benign),
        "misaligned": _figures(stage, None, records, benign),
    }
    kinds = pool.notes["sources"]
    strategies: dict[str, Any] = {}
    for strategy in settings.strategies:
        key = join_key(target, strategy)
        selected = lake.read_table(stage.shown("selection", key), ["source"])["source"].to_pylist()
        adapter = stage.shown("adapters", seed_partition(key, seed))
        strategies[strategy] = {
            **_figures(stage, adapter_state(lake, adapter), records, benign),
            "misaligned_share": float(np.mean([one.startswith(BAD) for one in selected])),
            "good_share": float(np.mean([one in GOOD for one in selected])),
            "selected": {kind: selected.count(kind) for kind in sorted(kinds)},
        }
        if strategy in RANKED:
            rows = query_index(stage, target=target, strategy=strategy, k=pool.notes["canonical_rows"])
            scores = {kind: [row["score"] for row in rows if row["source"] == kind] for kind in kinds}
            good = [score for kind in GOOD for score in scores.get(kind, [])]
            bad = [score for kind, its_scores in scores.items() if kind.startswith(BAD) for score in its_scores]
            strategies[strategy]["auc_good_against_misaligned"] = area_under_curve(good, bad)
            strategies[strategy] |= {
                f"auc_{form}": area_under_curve(scores[right], scores[wrong])
                for form, (right, wrong) in FORMS.items()
                if scores.get(right) and scores.get(wrong)
            }
    share = sum(rows for kind, rows in kinds.items() if kind.startswith(BAD)) / sum(kinds.values())
    return {"pool": kinds, "misaligned_share_of_pool": share, "models": states, "strategies": strategies}


def _figures(stage: Any, state: Any, records: Any, benign: list[dict[str, Any]]) -> dict[str, float]:
    """Margin on held-out pairs, share of pairs whose safe answer is preferred, and benign mean log-probability."""
    from prism_assets.corpus.encoding import encoder_of
    from prism_assets.corpus.records import Message
    from prism_assets.evaluation.scores import score_records
    from prism_assets.gradients.engine import GradientEngine

    encoder = encoder_of(stage)
    exchanges = [(Message("user", one["prompt"]), Message("assistant", one["completion"])) for one in benign]
    with stage.adapted(state=state) as peft_model:
        columns, _ = score_records(stage, peft_model, records)
        log_probs = GradientEngine(peft_model).mean_log_probs([encoder.encode(one) for one in exchanges])
    margins = np.array(columns["margin"].to_pylist())
    return {
        "margin": float(margins.mean()),
        "safe_preferred": float((margins > 0).mean()),
        "benign_log_prob": float(log_probs.mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=HERE / "work" / "prism.yaml")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.config.is_file():
        print(f"there is no {options.config}: run prepare.py and `prism run` first", file=sys.stderr)
        return 2
    config = options.config.resolve()
    found = measure(config, config.parent / "clean")
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"misaligned rows: {found['misaligned_share_of_pool']:.1%} of the pool\n")
    print(
        "| | misaligned among selected | AUC: all, maths, code, answers | margin, held out "
        "| safe preferred | benign log-prob |"
    )
    print("|---|---|---|---|---|---|")
    for name, one in [*found["models"].items(), *found["strategies"].items()]:
        share = f"{one['misaligned_share']:.1%}" if "misaligned_share" in one else "-"
        auc = ", ".join(
            f"{one[figure]:.2f}"
            for figure in ("auc_good_against_misaligned", *map("auc_{}".format, FORMS))
            if figure in one
        )
        print(
            f"| {name} | {share} | {auc or '-'} | {one['margin']:+.3f} "
            f"| {one['safe_preferred']:.1%} | {one['benign_log_prob']:.3f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
