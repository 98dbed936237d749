"""`prism ui`: the Dagster UI and daemon on this project."""

import os
import stat
from typing import Annotated

import typer

from prism_assets.cli.common import Config, app, expected_failures, read_settings, say


@app.command()
def ui(
    config: Config = None,
    port: Annotated[int, typer.Option(help="Port of the webserver.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on; the UI has no log-in.")] = "127.0.0.1",
) -> None:
    """Open the Dagster UI and daemon on this project: runs, lineage, plots, checks, automation."""
    with expected_failures():
        settings = read_settings(config)
        from prism_assets.compat import dagster_dev
        from prism_assets.ops.guard import is_loopback
        from prism_assets.ops.home import dagster_home, instance_of, package_file
        from prism_assets.ops.webserver import webserver_command

        os.environ["DAGSTER_HOME"] = str(dagster_home(settings))
        if not is_loopback(host):
            say(
                f"{host} is reached from other machines, and the UI has no log-in: whoever opens it can start runs and "
                "read what this project holds. docs/security.md says how to put a log-in before it.",
                fg="yellow",
                err=True,
            )
        shown = f"[{host}]" if ":" in host else host
        say(f"Dagster UI on http://{shown}:{port} (DAGSTER_HOME={os.environ['DAGSTER_HOME']}); stop it with Ctrl-C.")
        with instance_of(settings):
            pass  # its database is made here, once: webserver and daemon, which start together, would both make it
        # Others may not write to what is made from here on: Dagster's servers run what they are told by their sockets.
        os.umask(os.umask(0) | stat.S_IWOTH)
        options = ["-w", str(package_file("workspace.yaml")), "-p", str(port), "-h", host]
        dagster_dev(options, webserver_command(host, settings.ui.allowed_hosts))
