"""`prism doctor`: what this installation has, and what is stale."""

from typing import Annotated

import typer

from prism_assets.cli.common import (
    AsJson,
    Config,
    app,
    expected_failures,
    load_project,
    print_intake,
    print_json,
    print_table,
    read_settings,
)


@app.command()
def doctor(
    config: Config = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every artefact whole and compare it with its content hash.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What this installation has: versions, device, model, inbox, and what is stale or damaged."""
    with expected_failures():
        settings = read_settings(config)
        from prism_assets.ops.doctor import examine, intake_of_today, integrity

        stage = load_project(settings).stage
        verified = integrity(stage) if verify else []  # first: what is damaged counts as not made
        findings = [*examine(stage), *verified]
        if as_json:
            print_json([finding._asdict() for finding in findings])
        else:
            from rich.text import Text

            marks = {"ok": Text("✓", "green"), "note": Text("•", "yellow"), "problem": Text("✗", "red")}
            print_table(["", "what", "found"], [[marks[f.state], f.what, f.found] for f in findings])
            intake = intake_of_today(stage)
            if intake is not None and intake.parts:
                print_intake(intake._replace(ignored=[]))  # they are among the findings
        if any(finding.state == "problem" for finding in findings):
            raise typer.Exit(2)
