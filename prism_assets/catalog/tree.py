"""Lineage as a tree on the terminal."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prism_assets.text import one_line, visible

if TYPE_CHECKING:
    from rich.tree import Tree

# In the tree; --json and --all show everything.
SHOWN_OF_A_LIST = 8
_SETTINGS_WIDTH = 300


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


def _settings_text(settings: dict[str, Any]) -> str:
    text = ", ".join(
        f"{name}={value if isinstance(value, str | int | float) else json.dumps(value)}"
        for name, value in settings.items()
    )
    return one_line(text, _SETTINGS_WIDTH)


def _name_of(one: dict[str, Any]) -> str:
    return f"{one['table']}[{one['partition']}]" if one["partition"] else one["table"]


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(visible(text))
