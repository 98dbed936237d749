"""`prism lineage`: what an artefact was made from, all the way up, read from the artefacts themselves."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from prism_assets.errors import UnknownThing
from prism_assets.resources.lake.lake import Lake
from prism_assets.resources.lake.recipe import Artifact, Reference, references
from prism_assets.tables import ASSETS, table_named

_FINGERPRINT_PREFIX = re.compile(r"[0-9a-f]{4,32}\Z")
_PARTITION = re.compile(r"(?P<table>\w+)\[(?P<partition>.*)\]\Z", re.DOTALL)


def all_references(lake: Lake, artifact: Artifact) -> Iterator[Reference]:
    """What an artefact's header names, then what its rows name (blocks of features, segments of an index)."""
    named = set()
    for reference in references(artifact):
        named.add(reference.fingerprint)
        yield reference
    entry = table_named(artifact.table)
    for column, table in entry.rows_name.items() if entry else ():
        for fingerprint in lake.read_table(artifact, [column])[column].to_pylist():
            if fingerprint not in named:
                named.add(fingerprint)
                yield Reference(column, table, fingerprint, None, True)


def find_artifact(lake: Lake, thing: str) -> Artifact:
    """The artefact meant by a fingerprint (4 digits or more of it), a path, `table[partition]` or a shard key.

    Raises UnknownThing where there is none, or more than one; the message says what there is.
    """
    found = _by_path(lake, thing) or _by_head(lake, thing) or _by_fingerprint(lake, thing)
    if not found:
        raise UnknownThing(_no_such_thing(lake, thing))
    if len(found) > 1:
        listed = "\n".join(f"  {one.fingerprint}  {_name(one)}  {_facts(one)}" for one in found.values())
        raise UnknownThing(f"{thing} may be any of these; name one by its fingerprint:\n{listed}")
    return next(iter(found.values()))


def _by_path(lake: Lake, thing: str) -> dict[str, Artifact]:
    """The artefact that a file is, lies beside (a selection's .jsonl) or lies in (an adapter's weights)."""
    try:
        path = Path(thing).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # text that can be no path
        return {}
    owner = lake.owner_of(path)
    return _existing(lake, [owner]) if owner else {}


def _by_head(lake: Lake, thing: str) -> dict[str, Artifact]:
    """What a table's partition shows. An adapter's or evaluation's partition may be named without its seed."""
    match = _PARTITION.match(thing)
    table, partition = (match["table"], match["partition"]) if match else (thing, None)
    table = next((one.table.name for one in ASSETS if one.name == table), table)
    heads = [head for head in lake.heads(table) if head["table"] == table] if re.fullmatch(r"\w+", table) else []
    chosen = [head for head in heads if head["partition"] == partition]
    if not chosen and partition:
        chosen = [head for head in heads if (head["partition"] or "").startswith(f"{partition}/seed-")]
    if not chosen and match is None:  # a shard key; its rows as they were read last
        shards = [head for head in lake.heads("candidates") if head["partition"] == thing]
        chosen = sorted(shards, key=lambda head: head["time"])[-1:]
    return _existing(lake, [(head["table"], head["fingerprint"]) for head in chosen])


def _by_fingerprint(lake: Lake, thing: str) -> dict[str, Artifact]:
    if not _FINGERPRINT_PREFIX.match(thing.lower()):
        return {}
    return _existing(lake, lake.beginning_with(thing.lower()))


def _existing(lake: Lake, names: list[tuple[str, str]]) -> dict[str, Artifact]:
    found = {name: lake.get(*name) for name in dict.fromkeys(names)}
    return {fingerprint: artifact for (_, fingerprint), artifact in found.items() if artifact is not None}


def _no_such_thing(lake: Lake, thing: str) -> str:
    heads = lake.heads()
    names = sorted({_head_name(head) for head in heads} | {h["partition"] for h in heads if h["table"] == "candidates"})
    if not names:
        return f"The lake at {lake.folder} is empty: `prism run` fills it."
    near = difflib.get_close_matches(thing, names, n=5, cutoff=0.3)
    return (
        f"Nothing in the lake at {lake.folder} matches {thing!r}. Name a fingerprint (its first 4 digits or more), a "
        f"path below {lake.folder}, table[partition] or a shard key; similar names: "
        f"{', '.join(near or names[:5])}."
    )


def _head_name(head: dict[str, Any]) -> str:
    return f"{head['table']}[{head['partition']}]" if head["partition"] else head["table"]


class Edge(NamedTuple):
    """One input of an artefact."""

    role: str
    table: str | None  # None for a plain content hash: a file, a tokenizer, a model
    fingerprint: str | None
    content_hash: str | None
    defines: bool  # whether it is part of the identity, or was only looked at
    missing: bool  # removed by `prism gc`, or found damaged


def trace(lake: Lake, artifact: Artifact) -> dict[str, Any]:
    """The whole chain above an artefact as plain data, the artefact first and each artefact once.

    `{"thing": fingerprint, "artifacts": [{table, partition, version, fingerprint, content_hash, stage_version,
    settings, notes, created, run_id, path, shown_as, inputs: [Edge as a dict…]}, …]}`. `shown_as` lists the heads
    that show the artefact now. A cycle (which publishing cannot make) is followed once.
    """
    shown: dict[tuple[str, str], list[str]] = {}
    for head in lake.heads():
        shown.setdefault((head["table"], head["fingerprint"]), []).append(_head_name(head))
    waiting, traced = [artifact], {}
    while waiting:
        one = waiting.pop()
        if one.fingerprint in traced:
            continue
        edges, above = [], []
        for reference in all_references(lake, one):
            # An input with a table has a fingerprint.
            parent = lake.get(reference.table, cast("str", reference.fingerprint)) if reference.table else None
            edges.append(Edge(*reference, missing=bool(reference.table) and parent is None))
            if parent is not None:
                above.append(parent)
        traced[one.fingerprint] = _described(lake, one, edges, shown.get((one.table, one.fingerprint), []))
        waiting += reversed(above)
    return {"thing": artifact.fingerprint, "artifacts": list(traced.values())}


def _described(lake: Lake, artifact: Artifact, edges: list[Edge], shown_as: list[str]) -> dict[str, Any]:
    header = artifact.header
    names = ("table", "partition", "version", "fingerprint", "content_hash", "stage_version", "settings", "notes")
    return {
        **{name: header.get(name) for name in (*names, "created", "run_id")},
        "path": str(lake.local(artifact)),
        "shown_as": sorted(shown_as),
        "inputs": [edge._asdict() for edge in edges],
    }


def _name(artifact: Artifact) -> str:
    return f"{artifact.table}[{artifact.partition}]" if artifact.partition else artifact.table


def _facts(artifact: Artifact) -> str:
    header = artifact.header
    words = [f"version {header['version']}" if header.get("version") else "", header.get("created", "")]
    strategy = artifact.notes.get("strategy") or (f"seed {artifact.notes['seed']}" if "seed" in artifact.notes else "")
    return ", ".join(word for word in (strategy, *words) if word)
