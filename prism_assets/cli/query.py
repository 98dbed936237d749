"""`prism query`: the index is queried with the direction of a target."""

from typing import TYPE_CHECKING, Annotated

import typer

from prism_assets.cli.common import (
    AsJson,
    Config,
    app,
    expected_failures,
    known_targets,
    load_project,
    print_json,
    print_table,
    read_settings,
    short,
)
from prism_assets.errors import UnknownThing, UserMistake

if TYPE_CHECKING:
    from prism_assets.settings import Settings
    from prism_assets.stage import Stage


@app.command()
def query(
    target: Annotated[str, typer.Argument(help="A target of prism.yaml.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many candidates.")] = 10,
    strategy: Annotated[str, typer.Option(help="prism, uniform or less.")] = "prism",
    version: Annotated[str | None, typer.Option(help="An older feature version.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Score four times k rows again without the sketch; needs the model.")
    ] = False,
    harmful: Annotated[
        bool,
        typer.Option("--harmful", help="Those of lowest influence, predicted to lower the target's objective most."),
    ] = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """The k candidates of highest influence on a target: the index is queried with the target's direction. Of a target
    with `use: remove` these are the most harmful rows."""
    with expected_failures():
        settings = read_settings(config)
        known_targets(settings, [target], "")
        stage = load_project(settings).stage
        from prism_assets.selection.selection import query_index

        if version and exact:
            raise UserMistake("--exact needs the model of today's version: leave out --version, or --exact.")
        version = _full_version(stage, version) if version else None
        rerank = 4.0 if exact else 0.0
        rows = query_index(
            stage, target=target, strategy=strategy, k=k, version=version, rerank=rerank, harmful=harmful
        )
        if as_json:
            print_json(rows)
            return
        columns = ["rank", "score", "source", "prompt", "completion", "shard", "id"]
        shown = [[short(row[name]) for name in columns] for row in rows]
        print_table(columns, shown, title=f"{strategy}: {_title(settings, target, harmful)}")


def _title(settings: "Settings", target: str, harmful: bool) -> str:
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
