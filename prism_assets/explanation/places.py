"""Rows of the pool by name: the shard and row of a candidate, and what excludes it."""

import difflib
from collections.abc import Iterator
from typing import NamedTuple

from prism_assets.errors import CannotExplain
from prism_assets.resources.lake import Artifact, Lake
from prism_assets.selection.pool import Pool

SHORTEST_PREFIX = 4
# Above so many ids, similar names are looked for among those with the same first two characters.
_COMPARED = 20_000


class Place(NamedTuple):
    """A row of the live pool."""

    shard: str
    row: int
    id: str
    record_id: str | None
    excluded: str | None  # duplicate or contamination


class Found(NamedTuple):
    """The row that counts, and what to say about its copies."""

    place: Place
    notes: list[str]


class Places:
    """Every row of a pool, found by id or by the record's own id."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.lake = pool, pool.lake
        self.all = list(places_of(pool))

    def find(self, example: str) -> Found:
        """The row meant by an id (4 digits or more of it) or a record id.

        Raises CannotExplain for one that is unknown, ambiguous or in no ranking.
        """
        exact = [place for place in self.all if example in (place.id, place.record_id)]
        places = exact or [place for place in self.all if _matches(place, example)]
        names = sorted({place.id for place in places})
        if not names:
            raise CannotExplain(self._unknown(example))
        if len(names) > 1:
            shown = {place.id: place for place in reversed(places)}
            listed = "\n".join(f"  {p.id}  shard {p.shard}, row {p.row}, id {p.record_id}" for p in shown.values())
            raise CannotExplain(f"{example} may be any of these {len(names)}; name one by its id:\n{listed}")
        copies = [place for place in self.all if place.id == names[0]]
        counted = [place for place in copies if place.excluded is None]
        if not counted:
            raise CannotExplain(self._contaminated(copies[0]))
        others = [one for one in copies if one is not counted[0]]
        said = [f"The same example is also in {one.shard}, row {one.row}; it counts once, here." for one in others]
        return Found(counted[0], said)

    def _contaminated(self, place: Place) -> str:
        held_back = []
        for reference in self.pool.manifest.header["inputs"].get("held_back", []):
            artifact = self.lake.get(reference["table"], reference["fingerprint"])
            rows = self.lake.read_table(artifact, ["conversation_id", "line"]).to_pylist() if artifact else []
            kind = "target" if reference["table"] == "targets" else "held-out"
            held_back += [
                f"{kind} record of {artifact.partition} (line {row['line']})"
                for row in rows
                if artifact and row["conversation_id"] == place.id
            ]
        return (
            f"{place.id} (shard {place.shard}, row {place.row}) is in no ranking: it equals the "
            f"{' and the '.join(held_back) or 'a target or held-out record'}, so selecting it would be contamination."
        )

    def _unknown(self, example: str) -> str:
        for head in self.lake.heads("candidates"):
            artifact = self.lake.get("candidates", head["fingerprint"])
            known = head["scope"] == self.pool.manifest.header["version"]
            if artifact is None or not known or head["partition"] in self.pool.fingerprints:
                continue
            if any(_matches(place, example) for place in _rows(self.lake, artifact, head["partition"], {})):
                return (
                    f"{example} is in shard {head['partition']}, which is not in the live pool: its file left the "
                    "inbox (then it is retired), or is new (then run `prism run`)."
                )
        if len(example) < SHORTEST_PREFIX:
            return f"{example!r} is too short for the beginning of an id: give at least {SHORTEST_PREFIX} digits."
        names: list[str] = []
        for place in self.all:
            names += [place.id, *([place.record_id] if place.record_id else [])]
        if len(names) > _COMPARED:
            names = [name for name in names if name[:2] == example[:2]][:_COMPARED]
        near = difflib.get_close_matches(example, names, n=3, cutoff=0.4)
        advice = f" Similar names: {', '.join(near)}." if near else ""
        return f"The live pool has no candidate with the id or record id {example!r}.{advice}"


def places_of(pool: Pool) -> Iterator[Place]:
    """Every row of a pool. Raises LakeError where the rows of a shard are gone."""
    for row in pool.lake.read_table(pool.manifest).to_pylist():
        reasons = dict(zip(row["excluded_rows"], row["excluded_reasons"], strict=True))
        yield from _rows(pool.lake, pool.candidates_of(row["shard"]), row["shard"], reasons)


def _rows(lake: Lake, candidates: Artifact, shard: str, reasons: dict[int, str]) -> Iterator[Place]:
    rows = lake.read_table(candidates, ["id", "record_id"]).to_pylist()
    for position, row in enumerate(rows):
        yield Place(shard, position, row["id"], row["record_id"], reasons.get(position))


def _matches(place: Place, example: str) -> bool:
    if example in (place.id, place.record_id):
        return True
    return len(example) >= SHORTEST_PREFIX and place.id.startswith(example.lower())
