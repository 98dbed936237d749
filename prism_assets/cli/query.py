"""`prism query`: the index is queried with the direction of a target."""

from typing import TYPE_CHECKING, Annotated

import typer

from prism_assets.cli.common import (
    AsJson,
    Config,
    app,
    expected_failures,
    known_targets,
    print_json,
    print_table,
    read_settings,
    say,
    short,
)
from prism_assets.cli.formats import AsFormat, chosen, write_rows
from prism_assets.errors import UnknownThing, UserMistake

if TYPE_CHECKING:
    from prism_assets.selection.query import Answer
    from prism_assets.settings import Settings
    from prism_assets.stage import Stage


@app.command()
def query(
    target: Annotated[str, typer.Argument(help="A target of prism.yaml.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many candidates.")] = 10,
    strategy: Annotated[str, typer.Option(help="One of prism.yaml's, or uniform or less.")] = "prism",
    offset: Annotated[int, typer.Option(min=0, help="How many of the first are left out.")] = 0,
    around_cut: Annotated[
        bool, typer.Option("--around-cut", help="The last half of k that were selected and the first that were not.")
    ] = False,
    version: Annotated[str | None, typer.Option(help="An older feature version.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Score four times k rows again without the sketch; needs the model.")
    ] = False,
    harmful: Annotated[
        bool,
        typer.Option("--harmful", help="Those of lowest influence, predicted to lower the target's objective most."),
    ] = False,
    config: Config = None,
    form: AsFormat = "table",
    as_json: AsJson = False,
) -> None:
    """The k candidates of highest influence on a target: the index is queried with the target's direction. Of a target
    with `use: remove` these are the most harmful rows. A strategy without a direction (prism-cover, bm25) gives its own
    order."""
    with expected_failures():
        form = chosen(form, as_json)
        settings = read_settings(config)
        known_targets(settings, [target], "")
        from prism_assets.engines import open_stage

        stage = open_stage(settings)
        from prism_assets.selection.query import ask, selected_rows

        if version and exact:
            raise UserMistake("--exact needs the model of today's version: leave out --version, or --exact.")
        version = _full_version(stage, version) if version else None
        if around_cut and (offset or version or harmful):
            raise UserMistake("--around-cut says where it begins, today: leave out --offset, --version and --harmful.")
        cut = selected_rows(stage, target, strategy) if around_cut else None
        if cut is not None:
            offset = max(cut - k // 2, 0)
        answer = ask(
            stage,
            target=target,
            strategy=strategy,
            k=k,
            offset=offset,
            version=version,
            rerank=4.0 if exact else 0.0,
            harmful=harmful,
        )
        rows = answer.rows
        if settings.selection.rerank == "all" and answer.scores == "sketch":
            say("scores of the sketch: exact ones are not known yet; --exact computes them", err=True)
        if cut is not None:
            rows = [{**row, "taken": row["rank"] <= cut} for row in rows]
        if form == "json":
            print_json(rows)
        elif form == "table":
            columns = ["rank", *(["taken"] if cut is not None else []), "score", "source", "prompt", "completion"]
            columns += ["shard", "id"]
            shown = [[short(row[name]) for name in columns] for row in rows]
            print_table(columns, shown, title=f"{strategy}: {_title(settings, target, strategy, harmful)}{_by(answer)}")
        else:
            import pyarrow as pa

            table = pa.Table.from_pylist(rows)
            write_rows(table.to_batches(), table.schema, form)


def _by(answer: "Answer") -> str:
    return f" (scores: {answer.scores})" if answer.scores else ""


def _title(settings: "Settings", target: str, strategy: str, harmful: bool) -> str:
    from prism_assets.selection.strategies import STRATEGIES

    if not STRATEGIES[strategy].needs_direction:
        return f"candidates for {target} in this strategy's order"
    if settings.targets[target].use == "remove":
        return f"rows predicted to raise the preference for the unwanted answers of {target} most, first to be removed"
    if harmful:
        return f"candidates of lowest influence on {target}, predicted to harm it most"
    return f"candidates of highest influence on {target}"


def _full_version(stage: "Stage", beginning: str) -> str:
    """The one feature version of the lake that begins so. Raises UnknownThing where there is none, or more than one."""
    from prism_assets.identity import feature_versions

    known = [one.name for one in feature_versions(stage.lake)]
    found = [name for name in known if name.startswith(beginning)]
    if len(found) != 1:
        which = "may be any of" if found else "is not in the lake, which has"
        raise UnknownThing(f"--version {beginning} {which}: {', '.join(found or known) or 'no feature version yet'}.")
    return found[0]
