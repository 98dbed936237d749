"""`prism lineage`: what an artefact was made from."""

from typing import Annotated

import typer

from prism_assets.cli.common import AsJson, Config, app, console, expected_failures, print_json, read_settings


@app.command()
def lineage(
    thing: Annotated[
        str,
        typer.Argument(
            help="A fingerprint (4 digits or more), a path, table\\[partition] such as selection\\[prism|gsm8k], or a "
            "shard key."
        ),
    ],
    everything: Annotated[bool, typer.Option("--all", help="Draw also the tail of long lists.")] = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """What an artefact was made from, all the way up: fingerprints, settings, stage versions, Dagster runs."""
    with expected_failures():
        settings = read_settings(config)
        from prism_assets.catalog.lineage import find_artifact, trace
        from prism_assets.catalog.tree import draw
        from prism_assets.engines import open_lake

        lake = open_lake(settings)
        traced = trace(lake, find_artifact(lake, thing))
        if as_json:
            print_json(traced)
            return
        console().print(draw(traced, everything))
