"""Prints, from report.json, what each strategy selected and what that gained.

    python examples/real_text/summary.py [REPORT.json] [--match TARGET=SOURCE_PREFIX ...]

A selected row "matches" where its `source` starts with the target's prefix. Sources are never shown to the
selection; they are counted here only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPORT = Path(__file__).resolve().parent / "work" / "report" / "report.json"
METRICS = ("mean_log_prob", "target_preference", "exact_match")
MATCHES = {"gsm8k": "flan_cot/gsm8k", "tydiqa": "tydiqa/"}


def matching(composition: Mapping[str, int], prefix: str) -> tuple[int, int]:
    """Rows of sources that start with the prefix, and rows of all sources."""
    return sum(n for source, n in composition.items() if source.startswith(prefix)), sum(composition.values())


def spread(metric: Mapping[str, Any] | None) -> str:
    """Mean ± standard deviation over seeds, or a dash where the metric does not exist."""
    if metric is None:
        return "-"
    deviation = f" ± {metric['std']:.4f}" if metric["std"] is not None else ""
    return f"{metric['mean']:.4f}{deviation}"


def table_of(target: Mapping[str, Any], prefix: str) -> list[list[str]]:
    """The rows of one target's table, its header first."""
    inside, total = matching(target["pool"]["sources"], prefix)
    share = inside / total
    before = [target["base"][metric] for metric in METRICS]
    rows = [
        ["", "matching rows", "share", "times the pool's", "mean log-prob", "preference", "exact match"],
        ["pool, base model", f"{inside} of {total}", f"{share:.1%}", "1.0"]
        + ["-" if value is None else f"{value:.4f}" for value in before],
    ]
    for name, entry in target["strategies"].items():
        hits, chosen = matching(entry["composition"], prefix)
        lift = f"{hits / chosen / share:.1f}" if share else "-"
        held_out = [spread(entry[metric]) for metric in METRICS]
        rows.append([name, f"{hits} of {chosen}", f"{hits / chosen:.1%}", lift, *held_out])
    return rows


def diagnostics_of(target: Mapping[str, Any]) -> list[str]:
    """What is known of the direction before anything is selected."""
    direction = target["direction"]
    numbers = direction["effective_number_of_targets"]
    effective = ", ".join(f"{name} {value:.1f}" for name, value in numbers.items())
    lines = [f"effective number of targets (of {target['number_of_targets']}): {effective}"]
    for name, step in direction["first_order"].items():
        if isinstance(step, Mapping):
            values = [f"{key} {value:.3g}" for key, value in step.items() if isinstance(value, float | int)]
            lines.append(f"a small step along {name}: {', '.join(values)}")
    return lines


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def largest_sources(composition: Mapping[str, int], number: int = 5) -> str:
    """The sources with most rows, and how many."""
    top = sorted(composition.items(), key=lambda item: -item[1])[:number]
    return ", ".join(f"{source} {rows}" for source, rows in top)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, nargs="?", default=REPORT)
    parser.add_argument("--match", action="append", default=[], metavar="TARGET=SOURCE_PREFIX")
    arguments = parser.parse_args()
    if not arguments.report.is_file():
        print(f"there is no {arguments.report}: run prepare.py and `prism run` first", file=sys.stderr)
        return 2
    prefixes = MATCHES | dict(pair.split("=", 1) for pair in arguments.match)
    for name, target in json.loads(arguments.report.read_text(encoding="utf-8"))["targets"].items():
        if name not in prefixes:
            print(f"{name}: name its sources with --match {name}=SOURCE_PREFIX", file=sys.stderr)
            return 2
        print(f"\n## {name}: rows from {prefixes[name]}*\n\n{markdown(table_of(target, prefixes[name]))}\n")
        for line in diagnostics_of(target):
            print(f"- {line}")
        for strategy, entry in target["strategies"].items():
            print(f"- {strategy} takes most from: {largest_sources(entry['composition'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
