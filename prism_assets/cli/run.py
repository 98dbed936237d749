"""`prism run`: from the files in the inbox to the report."""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from prism_assets.cli.common import (
    AsJson,
    Config,
    Targets,
    app,
    expected_failures,
    known_targets,
    print_files,
    print_intake,
    print_json,
    print_table,
    read_settings,
    run_steps,
    say,
)

if TYPE_CHECKING:
    from prism_assets.settings import Settings


@app.command()
def run(
    config: Config = None,
    target: Targets = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard, mlflow or wandb (repeatable): gets the losses of what is trained in this run."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring everything up to date: from the files in the inbox to the report. What exists is not computed again."""
    with expected_failures():
        if report_to:
            # An override like any other: definitions.py reads the same settings.
            os.environ["PRISM_TRAINING__REPORT_TO"] = json.dumps(report_to)
        settings = read_settings(config)
        known_targets(settings, target)
        run_everything(settings, target, as_json)


def run_everything(settings: "Settings", targets: Sequence[str] | None = None, as_json: bool = False) -> None:
    """Run all steps and show the results."""
    from prism_assets.ops.doctor import intake_of_today
    from prism_assets.selection.handed_out import hand_out

    loaded, results = run_steps(settings, targets)
    intake, files = intake_of_today(loaded.stage), hand_out(loaded.stage, targets)
    report = settings.storage.report / "report.json"
    data = json.loads(report.read_text(encoding="utf-8"))
    if as_json:
        steps = [
            {"step": one.step.title, "computed": one.computed, "seconds": one.seconds, "runs": one.run_ids}
            for one in results
        ]
        given = None if intake is None else intake.as_data()
        print_json(
            {
                "steps": steps,
                "intake": given,
                "files": [one._asdict() for one in files],
                "report": str(report),
                "targets": data["targets"],
            }
        )
        return
    from prism_assets.report.comparison import comparison_table

    if intake is not None:
        print_intake(intake)
        say()
    header, *rows = comparison_table(data)
    print_table(header, rows, title="Held-out results (mean ± standard deviation over seeds)")
    say()
    print_files(files)
    config = os.environ["PRISM_CONFIG"]
    say(f"\nReport:  {report.with_suffix('.html')}")
    say(f"Browse the same history in the Dagster UI:  prism ui --config {config}")
