"""What became of the records that were given: used, or why not, file by file. Nothing is lost without a line here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.corpus.record_file import WHOLE_FILE

if TYPE_CHECKING:
    from prism_assets.corpus.inbox import Ignored
    from prism_assets.resources.lake import Artifact
    from prism_assets.stage import Stage

CANDIDATES = "candidates"  # the part that is the pool
SHOW_REJECTS = 'prism sql "SELECT kind, name, line, field, reason FROM rejects"'
COLUMNS = ("records of", "files", "given", "used", "rejected", "duplicates", "target or held-out", "cut")
_KINDS = 30  # of reasons that are counted apart for a file
OTHER_REASONS = "other reasons"
DUPLICATE = "duplicate of line …"


class Part(NamedTuple):
    """The records of the pool, of a target's examples, or of its held-out records: given = used + rejected +
    duplicates + contaminated."""

    name: str
    files: int
    given: int
    used: int
    rejected: int
    duplicates: int
    contaminated: int  # equal to a target or held-out record
    cut: int  # used, but a part of the prompt, or the end of a text, did not fit into max_length
    reasons: Mapping[str, int]  # of the rejected, figures left out
    unreadable: Mapping[str, str]  # by file: why nothing of it is used
    unused_fields: Sequence[str]

    def row(self) -> list[Any]:
        """The figures, as `COLUMNS` names them."""
        return [self.name, self.files, self.given, self.used, *self[4:8]]


class Intake(NamedTuple):
    """All that was given to a project, and what became of it."""

    parts: list[Part]
    ignored: list[tuple[str, str]]  # files of the inbox that are no candidates, and why

    @property
    def reasons(self) -> list[tuple[str, str, int]]:
        """Whose records were rejected, why, and how many, the most frequent first."""
        found = [(part.name, reason, count) for part in self.parts for reason, count in part.reasons.items()]
        return sorted(found, key=lambda one: -one[2])

    def notes(self) -> list[str]:
        """What else is to be known: unreadable and ignored files, fields that are not used."""
        unreadable = [f"not read: {name}: {why}" for part in self.parts for name, why in part.unreadable.items()]
        ignored = [f"ignored: {path}: {why}" for path, why in self.ignored]
        fields = sorted({name for part in self.parts for name in part.unused_fields})
        return unreadable + ignored + ([f"fields that are not used: {', '.join(fields)}"] if fields else [])

    def as_data(self) -> dict[str, Any]:
        """Parts and ignored files as JSON has them."""
        return {
            "parts": [part._asdict() for part in self.parts],
            "ignored": [{"path": path, "reason": why} for path, why in self.ignored],
        }


class ReasonCounts:
    """Counts of the reasons of a file's rejects, alike but for figures counted together."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, field: str, reason: str, count: int = 1) -> None:
        """Count a reject."""
        alike = re.sub(r"\d[\d,.]*", "…", f"{field}: {reason}" if field else reason)
        known = alike == DUPLICATE or alike in self.counts or len(self.counts) < _KINDS
        self.counts[alike if known else OTHER_REASONS] += count


def intake_notes(rejects: Mapping[str, int], unreadable: str) -> dict[str, Any]:
    """What the rows of a file note of its rejects."""
    return {"reasons": dict(rejects), "unreadable": unreadable}


def intake(stage: Stage, ignored: Iterable[Ignored] = (), shards: Sequence[str] | None = None) -> Intake:
    """What became of the records of the shards (None: of those of the live pool) and of those of every target, as far
    as the lake shows them."""
    parts = [part for part in (_pool(stage, shards), *_targets(stage)) if part is not None]
    return Intake(parts, [(str(one.path), one.reason) for one in ignored])


def _pool(stage: Stage, shards: Sequence[str] | None) -> Part | None:
    """The candidates of the shards."""
    pool = stage.shown_or_none("live_pool")
    listed: dict[str, str] = {}
    if pool is not None:
        table = stage.lake.read_table(pool, ["shard", "candidates_fingerprint"])
        listed = dict(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    files = {}
    for shard in listed if shards is None else shards:
        known = listed.get(shard)
        rows = stage.shown_or_none("candidates", shard) if known is None else stage.lake.get("candidates", known)
        if rows is not None:
            files[shard] = rows
    if not files:
        return None
    part = _part(stage, CANDIDATES, "rejects", files)
    if pool is None or files.keys() != listed.keys():
        return part  # what is in several files, or somebody's target, is known once the pool is listed
    # Rows that are in several files, and those that are somebody's target.
    left_out = {name: pool.notes[name] for name in ("duplicates", "contaminated")}
    return part._replace(
        used=part.used - sum(left_out.values()),
        duplicates=part.duplicates + left_out["duplicates"],
        contaminated=left_out["contaminated"],
    )


def _targets(stage: Stage) -> list[Part]:
    parts = []
    for name in stage.settings.targets:
        for table, words in (("targets", f"target {name}"), ("eval_examples", f"held-out of {name}")):
            rows = stage.shown_or_none(table, name)
            if rows is not None:
                parts.append(_part(stage, words, f"{table}_rejects", {name: rows}))
    return parts


def _part(stage: Stage, name: str, rejects: str, files: Mapping[str, Artifact]) -> Part:
    reasons: Counter[str] = Counter()
    unreadable: dict[str, str] = {}
    fields: set[str] = set()
    totals: Counter[str] = Counter()
    for file, rows in files.items():
        notes = rows.notes
        if "reasons" not in notes:
            notes = {**notes, **_counted(stage, stage.shown_or_none(rejects, file))}
        reasons.update(notes["reasons"])
        totals.update({key: notes.get(key, 0) for key in ("rows", "truncated")})
        fields.update(notes.get("unused_fields", ()))
        if notes["unreadable"]:
            unreadable[file] = notes["unreadable"]
    duplicates = reasons.pop(DUPLICATE, 0)
    rejected, used = reasons.total(), totals["rows"]
    given = used + rejected + duplicates
    counts = (len(files), given, used, rejected, duplicates, 0, totals["truncated"])
    return Part(name, *counts, dict(reasons.most_common()), unreadable, sorted(fields))


def _counted(stage: Stage, rejects: Artifact | None) -> dict[str, Any]:
    """The notes of rows that were read before their rejects were counted."""
    found = [] if rejects is None else stage.lake.read_table(rejects, ["field", "reason"]).to_pylist()
    counts, unreadable = ReasonCounts(), ""
    for one in found:
        if one["field"] == WHOLE_FILE:
            unreadable = one["reason"]
        else:
            counts.add(one["field"], one["reason"])
    return intake_notes(counts.counts, unreadable)
