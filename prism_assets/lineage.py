"""`prism lineage`: what an artefact was made from, all the way up, read from the artefacts themselves."""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from resources.lake import Artifact, Lake, Reference, references

if TYPE_CHECKING:
    from rich.tree import Tree

# An asset whose artefacts lie in a table of another name.
_TABLE_OF_ASSET = {
    **{"adapter": "adapters", "evaluation": "evaluations", "target_direction": "target_directions"},
    **{"experiment": "experiments", "experiment_trials": "trials"},
}
_FINGERPRINT_PREFIX = re.compile(r"[0-9a-f]{4,32}\Z")
_PARTITION = re.compile(r"(?P<table>\w+)\[(?P<partition>.*)\]\Z", re.DOTALL)
# Columns of a table that name other artefacts: table -> column -> table of what it names.
_ROW_REFERENCES: dict[str, dict[str, str]] = {
    "candidate_features": {"block": "feature_blocks"},
    "candidate_index": {"segment": "index_segments", "features": "candidate_features"},
    "live_pool": {"candidates_fingerprint": "candidates"},
}
# In the tree; --json and --all show everything.
SHOWN_OF_A_LIST = 8


class UnknownThing(Exception):
    """Nothing in the lake, or more than one thing, goes by the name that was given; the message lists what is near."""


def all_references(lake: Lake, artifact: Artifact) -> Iterator[Reference]:
    """What an artefact's header names, then what its rows name (blocks of features, segments of an index)."""
    named = set()
    for reference in references(artifact):
        named.add(reference.fingerprint)
        yield reference
    for column, table in _ROW_REFERENCES.get(artifact.table, {}).items():
        for fingerprint in lake.read_table(artifact, [column])[column].to_pylist():
            if fingerprint not in named:
                named.add(fingerprint)
                yield Reference(column, table, fingerprint, None, True)


# -- finding the thing -------------------------------------------------------------------------------------------


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
    home = (lake.folder / "artifacts").resolve()
    try:
        path = Path(thing).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # text that can be no path
        return {}
    if not path.is_relative_to(home) or len(path.relative_to(home).parts) < 2:
        return {}
    table, name = path.relative_to(home).parts[:2]
    return _existing(lake, [(table, name.split(".")[0])])


def _by_head(lake: Lake, thing: str) -> dict[str, Artifact]:
    """What a table's partition shows. An adapter's or evaluation's partition may be named without its seed."""
    match = _PARTITION.match(thing)
    table, partition = (match["table"], match["partition"]) if match else (thing, None)
    table = _TABLE_OF_ASSET.get(table, table)
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
    paths = (lake.folder / "artifacts").glob(f"*/{thing.lower()}*")
    return _existing(lake, [(path.parent.name, path.name.split(".")[0]) for path in sorted(paths)])


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
        f"Nothing in the lake at {lake.folder} goes by {thing!r}. Name a fingerprint (its first 4 digits or more), a "
        f"path below {lake.folder / 'artifacts'}, table[partition] or a shard key; near it: "
        f"{', '.join(near or names[:5])}."
    )


def _head_name(head: dict[str, Any]) -> str:
    return f"{head['table']}[{head['partition']}]" if head["partition"] else head["table"]


# -- the chain ---------------------------------------------------------------------------------------------------


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
    that show the artefact now. A chain that bites its own tail (which publishing cannot make) ends there.
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
            parent = lake.get(reference.table, reference.fingerprint) if reference.table else None
            edges.append(Edge(*reference, missing=bool(reference.table) and parent is None))
            if parent is not None:
                above.append(parent)
        traced[one.fingerprint] = _described(one, edges, shown.get((one.table, one.fingerprint), []))
        waiting += reversed(above)
    return {"thing": artifact.fingerprint, "artifacts": list(traced.values())}


def _described(artifact: Artifact, edges: list[Edge], shown_as: list[str]) -> dict[str, Any]:
    header = artifact.header
    names = ("table", "partition", "version", "fingerprint", "content_hash", "stage_version", "settings", "notes")
    return {
        **{name: header.get(name) for name in (*names, "created", "run_id")},
        "path": str(artifact.path),
        "shown_as": sorted(shown_as),
        "inputs": [edge._asdict() for edge in edges],
    }


# -- the tree ----------------------------------------------------------------------------------------------------


def draw(traced: dict[str, Any], everything: bool = False) -> "Tree":
    """What `trace` found as a Rich tree: an artefact's inputs below it, a shared one drawn once and then named.

    Of a list of inputs (the shards of an index) the first few are drawn, or with `everything` all.
    """
    from rich.tree import Tree

    artifacts = {one["fingerprint"]: one for one in traced["artifacts"]}
    drawn: set[str] = set()

    def grow(branch: "Tree", one: dict[str, Any]) -> None:
        drawn.add(one["fingerprint"])
        for edge, left_out in _visible(one["inputs"], everything):
            if left_out:
                branch.add(f"[cyan]{_escape(edge['role'])}[/]: [dim]{left_out} more; --all draws them[/]")
                continue
            parent = artifacts.get(edge["fingerprint"])
            seen = edge["fingerprint"] in drawn
            twig = branch.add(_edge_label(edge, parent, seen), highlight=False)
            if parent is not None and not seen:
                grow(twig, parent)

    start = artifacts[traced["thing"]]
    root = Tree(_label(start), highlight=False)
    grow(root, start)
    return root


def _visible(edges: list[dict[str, Any]], everything: bool) -> Iterator[tuple[dict[str, Any], int]]:
    """Edges with 0, or in place of the tail of a long list its last edge with the number left out."""
    by_role: dict[str, list[dict[str, Any]]] = {}
    for edge in edges:
        by_role.setdefault(edge["role"], []).append(edge)
    for group in by_role.values():
        shown = group if everything or len(group) <= SHOWN_OF_A_LIST else group[:SHOWN_OF_A_LIST]
        yield from ((edge, 0) for edge in shown)
        if len(shown) < len(group):
            yield group[-1], len(group) - len(shown)


def _edge_label(edge: dict[str, Any], parent: dict[str, Any] | None, seen: bool) -> str:
    role = f"[cyan]{_escape(edge['role'])}[/]"
    if not edge["defines"]:
        role += " [magenta](looked at; no part of the identity)[/]"
    if edge["table"] is None:
        return f"{role}: [dim]content {_escape(str(edge['content_hash'])[:32])}[/]"
    if parent is None:
        return (
            f"{role}: {_escape(edge['table'])} {edge['fingerprint'][:12]} "
            "[red]is no longer in the lake (removed by `prism gc`, or damaged)[/]"
        )
    if seen:
        return f"{role}: {_escape(_name_of(parent))} {parent['fingerprint'][:12]} [dim](drawn above)[/]"
    return f"{role}: {_label(parent)}"


def _label(one: dict[str, Any]) -> str:
    itself = (_name_of(one), f"{one['table']}[{one['fingerprint']}]")
    also = [name for name in one["shown_as"] if name not in itself]
    lines = [
        f"[bold]{_escape(_name_of(one))}[/] {one['fingerprint'][:12]}"
        + (f" [dim]also shown as {_escape(', '.join(also))}[/]" if also else ""),
        f"[dim]stage version {one['stage_version']}, {one['created']}, run {one['run_id'] or 'none'}[/]",
    ]
    if one["settings"]:
        lines.append(f"[dim]{_escape(_settings_text(one['settings']))}[/]")
    return "\n".join(lines)


def _settings_text(settings: dict[str, Any], width: int = 300) -> str:
    text = ", ".join(
        f"{name}={value if isinstance(value, str | int | float) else json.dumps(value)}"
        for name, value in settings.items()
    )
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _name_of(one: dict[str, Any]) -> str:
    return f"{one['table']}[{one['partition']}]" if one["partition"] else one["table"]


def _name(artifact: Artifact) -> str:
    return f"{artifact.table}[{artifact.partition}]" if artifact.partition else artifact.table


def _facts(artifact: Artifact) -> str:
    header = artifact.header
    words = [f"version {header['version']}" if header.get("version") else "", header.get("created", "")]
    strategy = artifact.notes.get("strategy") or (f"seed {artifact.notes['seed']}" if "seed" in artifact.notes else "")
    return ", ".join(word for word in (strategy, *words) if word)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
