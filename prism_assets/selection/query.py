"""Questions to a ranking: its rows from any place on, without a selection being made."""

from typing import Any, NamedTuple

from prism_assets.errors import SettingsError
from prism_assets.identity import join_key
from prism_assets.selection.direction_artifacts import COMPARED
from prism_assets.selection.ranking import top_of_ranking
from prism_assets.selection.selection_inputs import selection_inputs
from prism_assets.settings import Budget, Rerank
from prism_assets.stage import Stage


class Answer(NamedTuple):
    """The rows of a ranking, and by which scores they are ordered."""

    rows: list[dict[str, Any]]
    scores: str  # "exact", "sketch", or "" of a strategy without a direction


def query_index(stage: Stage, **asked: Any) -> list[dict[str, Any]]:
    """The rows of `ask`, which has the options."""
    return ask(stage, **asked).rows


def ask(
    stage: Stage,
    *,
    target: str,
    strategy: str = "prism",
    k: int = 10,
    offset: int = 0,
    version: str | None = None,
    rerank: Rerank = 0.0,
    harmful: bool = False,
) -> Answer:
    """The k candidates of highest influence on a target behind the first `offset`, from the index of a feature version
    (default: today's); of a target with `use: remove` those of its mixture that are first to be removed. A strategy
    without a direction gives its own order.

    `rerank` scores so many times k rows again without the sketch (today's version only: it needs the model). `harmful`:
    those of lowest influence, which are predicted to lower J most; of a target with `use: remove` it changes nothing.

    Raises SettingsError for a strategy that prism.yaml does not name or that has no order (oracle), or has no direction
    where `version`, `rerank` or `harmful` need one; LakeError where the version has none, or no index, yet.
    """
    from prism_assets.selection.strategies import STRATEGIES

    asked = (*stage.settings.strategies, *COMPARED)
    known = [one.name for one in STRATEGIES.values() if one.name in asked and not one.by_label]
    if strategy not in known:
        raise SettingsError(f"{strategy!r} ranks nothing here; prism.yaml has {', '.join(known)}.")
    if (version or rerank or harmful) and not STRATEGIES[strategy].needs_direction:
        raise SettingsError(
            f"{strategy} has no direction, so no older version of it can be asked, no exact score and no opposite."
        )
    if rerank and version not in (None, stage.feature_version):
        raise SettingsError("Exact scores need the model of today's feature version: ask an older one without them.")
    inputs = selection_inputs(stage, target, STRATEGIES[strategy], version=version)
    budget = Budget(kind="rows", amount=offset + k)
    settings = stage.settings.targets[target]
    reverse = harmful and settings.use == "keep"
    # Where selections go by exact scores of all rows, a query does too, as far as they are known without the model.
    everywhere = stage.settings.selection.rerank == "all" and version in (None, stage.feature_version)
    top = top_of_ranking(
        stage,
        STRATEGIES[strategy],
        inputs,
        budget,
        rerank="all" if everywhere else rerank,
        whole=bool(everywhere and rerank),
        source=settings.mixture,
        reverse=reverse,
    )
    columns = ["rank", "score", "id", "shard", "row", "source", "prompt", "completion"]
    found = top.table.select(columns).slice(offset).to_pylist()
    rows = [{**row, "score": -row["score"]} for row in found] if reverse else found
    exact = "exact" if top.notes.get("shortlist") is not None else "sketch"
    return Answer(rows, exact if STRATEGIES[strategy].needs_direction else "")


def selected_rows(stage: Stage, target: str, strategy: str) -> int:
    """How many rows of a ranking are taken: selected, or removed. Raises LakeError where nothing is selected yet."""
    notes = stage.shown("selection", join_key(target, strategy)).notes
    return notes.get("removed_rows", notes["rows"])
