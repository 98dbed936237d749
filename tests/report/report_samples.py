"""The content of report.json as tests want it: figures of three strategies, hostile texts wherever data is shown."""

import copy

from prism_assets.evaluation.metrics import mean_over_seeds
from prism_assets.selection.histogram import score_histogram

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'single' {{ 7 * 7 }} <img src=x onerror=y>"
VALUES = {
    "prism": ([0.631, 0.640, 0.622], [0.43, 0.44, 0.42]),
    "uniform": ([0.419, 0.433, 0.424], [0.31, 0.35, 0.30]),
    "random": ([0.520, 0.530, 0.525], [0.42, 0.45, 0.41]),
}


def strategy(preferences, matches) -> dict:
    return {
        "target_preference": mean_over_seeds(preferences),
        "mean_log_prob": mean_over_seeds([-value for value in preferences]),
        "exact_match": mean_over_seeds(matches),
        "selected": "lake/selection/x/selected.parquet",
        "selected_jsonl": "lake/selection/x/selected.jsonl",
        "adapter": "lake/adapter/x",
        "rows": 1200,
        "completion_tokens": 34567,
        "steps": 90,
        "composition": {"reverse": 900, HOSTILE: 300},
        "non_positive_influence": 0,
        "score_histogram": score_histogram([0.1, 0.2, 0.3, -0.1], selected=2, bins=4),
        "examples": [
            {
                "rank": rank,
                "score": 0.5 / rank,
                "source": HOSTILE,
                "prompt": f"{HOSTILE} {rank}",
                "completion": "ok",
            }
            for rank in range(1, 15)
        ],
    }


def sample() -> dict:
    target = {
        "kind": "plain",
        "number_of_targets": 20,
        "number_of_eval": 100,
        "pool": {"rows": 4200, "canonical": 4000, "sources": {"reverse": 1000, HOSTILE: 3000}},
        "direction": {
            "effective_number_of_targets": {"prism": 11.2, "uniform": 20},
            "temperature": 1.0,
            "log_z": -1.5,
            "checkpoints": 1,
            "first_order": {
                "step": 0.01,
                "prism": {"predicted": 3.1e-4, "measured": 3.0e-4, "held_out_mean_log_prob": 8e-4},
                "uniform": {"predicted": 2.1e-4, "measured": 1.9e-4, "held_out_mean_log_prob": 9e-4},
            },
            "weights": [
                {"id": f"id{i}", "preference": 0.5, "score": -0.7, "prism": (i + 0.5) / 200, "uniform": 0.05,
                 "less": 0.05, "prompt": f"{HOSTILE} target {i}"}
                for i in range(20)
            ],
        },
        "base": {"target_preference": 0.507, "mean_log_prob": -0.8, "exact_match": 0.4},
        "strategies": {name: strategy(*values) for name, values in VALUES.items()},
    }  # fmt: skip
    return {
        "format": 1,
        "created": "2026-03-01T12:00:00+00:00",
        "model": {"name": HOSTILE, "fingerprint": "ab" * 16},
        "settings": {"note": HOSTILE, "selection": {"budget": "5%"}},
        "lineage": {"manifest": "cd" * 16},
        "targets": {"reverse_noise": target, HOSTILE: copy.deepcopy(target)},
        "rejects": [{"shard": "pool-1a", "line": 3, "field": "prompt", "reason": HOSTILE}] * 60,
        "intake": {
            "parts": [
                {
                    "name": "candidates",
                    "files": 2,
                    "given": 1240,
                    "used": 1000,
                    "rejected": 33,
                    "duplicates": 200,
                    "contaminated": 7,
                    "cut": 5,
                    "reasons": {HOSTILE: 30, "missing": 3},
                    "unreadable": {"pool-1b": HOSTILE},
                    "unused_fields": [HOSTILE],
                },
                {
                    "name": HOSTILE,
                    "files": 1,
                    "given": 2,
                    "used": 2,
                    "rejected": 0,
                    "duplicates": 0,
                    "contaminated": 0,
                    "cut": 0,
                    "reasons": {},
                    "unreadable": {},
                    "unused_fields": [],
                },
            ],
            "ignored": [{"path": HOSTILE, "reason": "unknown extension"}],
        },
    }


def one_target() -> dict:
    data = sample()
    del data["targets"][HOSTILE]
    return data


def with_rows(data: dict) -> dict:
    """The sample with listed rows, overlaps, cuts and a map for its first target."""
    target = data["targets"]["reverse_noise"]
    rows = [
        {
            "id": f"id{number}",
            "source": HOSTILE if number % 3 == 0 else " plain  one",
            "prompt": f"{HOSTILE} prompt {number}",
            "completion": f"completion {number}",
            "tokens": number,
            # Of 60 rows prism took the first 40, uniform the last 30, random none of them.
            "taken": {
                **({"prism": [number + 1, 1 - number / 50]} if number < 40 else {}),
                **({"uniform": [60 - number, None]} if number >= 30 else {}),
            },
        }
        for number in range(60)
    ]
    target["listed"] = {"longest_text": 500, "totals": {"prism": 40, "uniform": 5000, "random": 0}, "rows": rows}
    target["overlaps"] = [{"first": "prism", "second": "uniform", "both": 10, "only_first": 30, "only_second": 4990}]
    shown = {"score": 0.5, "source": HOSTILE, "prompt": HOSTILE, "completion": HOSTILE, "id": "x"}
    cut = {"last": [{**shown, "rank": 40}], "left": [{**shown, "rank": 41}], "left_by_sketch": False, "why_not": None}
    target["cuts"] = {"prism": cut, "uniform": {**cut, "left": [], "why_not": "nothing is known of it"}}
    points = [
        {"x": number / 10, "y": -number / 10, "source": HOSTILE, "text": HOSTILE, "taken": ["prism"] * (number % 2)}
        for number in range(20)
    ]
    target["map"] = {"sampled": 10, "pool": 4000, "shares": [0.25, 0.125], "points": points}
    return data
