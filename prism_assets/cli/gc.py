"""`prism gc`: what nothing needs, shown or removed."""

import os
from typing import Annotated

import typer

from prism_assets.cli.common import (
    AsJson,
    Config,
    app,
    expected_failures,
    print_json,
    print_table,
    read_settings,
    say,
)
from prism_assets.errors import UserMistake


@app.command()
def gc(
    keep: Annotated[int, typer.Option(min=0, help="Older feature versions to keep beside the current one.")] = 1,
    min_age: Annotated[str, typer.Option(help="Keep what is younger than this: 90s, 30m, 1h, 2d.")] = "1h",
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, it is only shown.")] = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show, and with --yes remove, what no head and no kept feature version needs."""
    with expected_failures():
        settings = read_settings(config)
        age = _seconds(min_age)
        from prism_assets.engines import open_stage

        stage = open_stage(settings)
        from prism_assets.catalog.sql import refresh
        from prism_assets.ops.gc import collect, plan, runs_in_progress, summary, what_is_current
        from prism_assets.ops.home import dagster_home, instance_of

        lake = stage.lake
        os.environ["DAGSTER_HOME"] = str(dagster_home(settings))
        with instance_of(settings) as instance:
            running = runs_in_progress(instance)
        since = min((run.since for run in running), default=None)
        found = plan(lake, **what_is_current(stage)._asdict(), keep=keep, min_age=age, running_since=since)
        removed = collect(lake, found) if yes else {}
        if yes:
            refresh(lake)
        if as_json:
            print_json(summary(lake, found, removed if yes else None, running))
            return
        for run in running:
            say(f"Run {run.run_id} is in progress: what it may need is kept.", fg="yellow", err=True)
        tables = removed if yes else found.by_table()
        if tables:
            rows = [[table, count, f"{size / 2**20:,.2f}"] for table, (count, size) in tables.items()]
            print_table(["table", "artefacts", "MiB"], rows, title="Removed" if yes else "Not needed")
        total = sum(size for _, size in tables.values()) / 2**20
        say(
            f"{total:,.2f} MiB "
            f"{'freed.' if yes else 'can be freed; `prism gc --yes` frees them.' if tables else 'can be freed.'}"
        )
        say(f"Feature versions kept: {', '.join(found.kept_versions) or 'none'}.")
        if found.dropped_versions:
            say(f"Feature versions {'removed' if yes else 'to be removed'}: {', '.join(found.dropped_versions)}.")
        if found.spared_for_age:
            say(f"{found.spared_for_age} more artefacts are not needed but younger than {min_age}.")


def _seconds(text: str) -> float:
    """Seconds of `90s`, `30m`, `1h`, `2d`. Raises UserMistake for anything else."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        return float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
    except ValueError as error:
        raise UserMistake(f"--min-age {text}: write 90s, 30m, 1h or 2d.") from error
