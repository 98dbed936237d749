"""What became of the records that were given: used, or why not, file by file. Nothing is lost without a line here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.corpus.files import DUPLICATE_OF
from prism_assets.corpus.record_file import WHOLE_FILE

if TYPE_CHECKING:
    from prism_assets.corpus.inbox import Ignored
    from prism_assets.resources.lake import Artifact
    from prism_assets.stage import Stage

CANDIDATES = "candidates"  # the part that is the pool
SHOW_REJECTS = 'prism sql "SELECT kind, name, line, field, reason FROM rejects"'
FIGURES = ("files", "given", "used", "rejected", "duplicates", "contaminated", "cut")  # of a part
COLUMNS = ("records of", *(name if name != "contaminated" else "target or held-out" for name in FIGURES))
_KINDS = 30  # of reasons that are counted apart for a file
OTHER_REASONS = "other reasons"
DUPLICATE = f"{DUPLICATE_OF}…"


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
        return [self.name, *(getattr(self, name) for name in FIGURES)]


class Intake(NamedTuple):
    """All that was given to a project, and what became of it."""

    parts: list[Part]
    ignored: list[tuple[str, str]]  # files of the inbox that are no candidates, and why

    @property
    def reasons(self) -> list[tuple[str, str, int]]:
        """Whose records were rejected, why, and how many, the most frequent first."""
        found = [(part.name, reason, count) for part in self.parts for reason, count in part.reasons.items()]
        return sorted(found, key=lambda one: -one[2])

    @property
    def files(self) -> list[tuple[str, str, str]]:
        """Files of which nothing is used: "not read" or "ignored", which, and why."""
        unreadable = [("not read", *one) for part in self.parts for one in part.unreadable.items()]
        return [*unreadable, *(("ignored", *one) for one in self.ignored)]

    @property
    def unused_fields(self) -> list[str]:
        """Fields of records that are known to no format."""
        return sorted({name for part in self.parts for name in part.unused_fields})

    def notes(self) -> list[str]:
        """What else is to be known: unreadable and ignored files, fields that are not used."""
        notes = [f"{what}: {file}: {why}" for what, file, why in self.files]
        fields = ", ".join(self.unused_fields)
        return [*notes, *([f"fields that are not used: {fields}"] if fields else [])]

    def as_data(self) -> dict[str, Any]:
        """Parts and ignored files as JSON has them."""
        return {
            "parts": [part._asdict() for part in self.parts],
            "ignored": [{"path": path, "reason": why} for path, why in self.ignored],
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Intake:
        """The inverse of `as_data`."""
        ignored = [(one["path"], one["reason"]) for one in data["ignored"]]
        return cls([Part(**part) for part in data["parts"]], ignored)


class ReasonCounts:
    """Counts of the reasons of a file's rejects, alike but for figures counted together; `unreadable` is why nothing of
    the file is used, empty where it was read."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.unreadable = ""

    def add(self, field: str, reason: str) -> None:
        """Count a reject."""
        if field == WHOLE_FILE:
            self.unreadable = reason
            return
        alike = re.sub(r"\d[\d,.]*", "…", f"{field}: {reason}" if field else reason)
        known = alike == DUPLICATE or alike in self.counts or len(self.counts) < _KINDS
        self.counts[alike if known else OTHER_REASONS] += 1

    def notes(self) -> dict[str, Any]:
        """What the rows of a file note of its rejects."""
        return {"reasons": dict(self.counts), "unreadable": self.unreadable}


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
    labels = {target.label for target in stage.settings.targets.values()}  # they are for judging alone
    part = part._replace(unused_fields=[name for name in part.unused_fields if name not in labels])
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
    counts = ReasonCounts()
    for one in found:
        counts.add(one["field"], one["reason"])
    return counts.notes()
