"""`prism ui`: the Dagster UI and daemon on this project."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from prism_assets.cli.common import Config, app, expected_failures, read_settings


@app.command()
def ui(
    config: Config = None,
    port: Annotated[int, typer.Option(help="Port of the webserver.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Open the Dagster UI and daemon on this project: runs, lineage, plots, checks, automation."""
    with expected_failures():
        settings = read_settings(config)
        from prism_assets.ops.home import dagster_home, package_file

        os.environ["DAGSTER_HOME"] = str(dagster_home(settings))
        workspace = package_file("workspace.yaml")
        dagster = Path(sys.executable).with_name("dagster")
        typer.echo(
            f"Dagster UI on http://{host}:{port} (DAGSTER_HOME={os.environ['DAGSTER_HOME']}); stop it with Ctrl-C."
        )
        os.execv(dagster, [str(dagster), "dev", "-w", str(workspace), "-p", str(port), "-h", host])
