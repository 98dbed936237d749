"""What all commands share: options, expected failures, tables and JSON."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from prism_assets.cli.heartbeat import Heartbeat
from prism_assets.errors import PrismError, UnknownThing
from prism_assets.text import in_json, one_line, visible

if TYPE_CHECKING:
    import dagster as dg
    from rich.console import Console

    from prism_assets.corpus.intake import Intake
    from prism_assets.ops.estimate import Estimate
    from prism_assets.ops.pipeline import Step, StepResult
    from prism_assets.project import Project
    from prism_assets.selection.handed_out import HandedOut
    from prism_assets.settings import Settings
    from prism_assets.stage import Stage

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"prism-assets {version('prism-assets')}")
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and exit.")
    ] = False,
) -> None:
    """Pick the SFT data worth fine-tuning on, with influence functions weighted by the model's preference."""


Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="The prism.yaml to use (else PRISM_CONFIG, else ./prism.yaml).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Targets = Annotated[list[str] | None, typer.Option("--target", "-t", help="Only this target (repeatable).")]
_CHECK_WIDTH = 240
_SHOWN_REASONS = 8  # and as many notes


@contextmanager
def expected_failures() -> Iterator[None]:
    """Turn an error of `prism_assets.errors` into its message and exit status."""
    try:
        yield
    except PrismError as error:
        raise _said(str(error), error.exit_status) from error
    except KeyboardInterrupt as error:
        raise _said("Interrupted. What was finished is kept; run again to go on.", 1) from error
    except Exception as error:
        from prism_assets.cli.machine_faults import advice

        found = advice(error)
        if found is None:
            raise
        raise _said(found, 1) from error


def _said(message: str, status: int) -> typer.Exit:
    """Say what went wrong, in red; raise what is returned."""
    say(message, fg="red", err=True)
    return typer.Exit(status)


# -- the project --------------------------------------------------------------------------------------------------


def read_settings(config: Path | None) -> "Settings":
    """The settings of a command. Raises SettingsError."""
    from prism_assets.settings import config_path, load_settings

    settings = load_settings(config)
    # Everything started from here (Dagster's own processes too) reads the same file.
    os.environ["PRISM_CONFIG"] = str(config_path(config))
    return settings


def known_targets(settings: "Settings", targets: Sequence[str] | None, option: str = "--target ") -> None:
    """Raises UnknownThing where one of them is no target of prism.yaml."""
    unknown = [name for name in targets or () if name not in settings.targets]
    if unknown:
        raise UnknownThing(f"{option}{unknown[0]}: prism.yaml names the targets {', '.join(settings.targets)}.")


class Loaded(NamedTuple):
    """A project with its definitions, and a Stage for what is done outside of runs."""

    project: "Project"
    definitions: "dg.Definitions"
    stage: "Stage"


def load_project(settings: "Settings") -> Loaded:
    """The code location itself, as Dagster loads it."""
    from prism_assets.definitions import build_definitions
    from prism_assets.project import Project
    from prism_assets.work import stage_without_run

    project = Project.of(settings)
    definitions = build_definitions(settings)
    return Loaded(project, definitions, stage_without_run(project, definitions))


def run_steps(
    settings: "Settings", targets: Sequence[str] | None, steps: "Sequence[Step] | None" = None, quiet: bool = False
) -> "tuple[Loaded, list[StepResult]]":
    """Run the steps (by default all of `prism run`) and print the result of each."""
    from rich.markup import escape

    from prism_assets.compat import interrupts_at_safe_points
    from prism_assets.ops.home import dagster_home, instance_of
    from prism_assets.ops.pipeline import Listener, run_pipeline

    terminal = console(err=True)
    os.environ["DAGSTER_HOME"] = str(dagster_home(settings))
    loaded = load_project(settings)

    heartbeat = Heartbeat(lambda line: terminal.print(line, highlight=False, markup=False, soft_wrap=True))

    def on_step(step: "Step") -> None:
        heartbeat.step(step.title)
        if terminal.is_terminal:
            terminal.print(f"[dim]… {step.title}[/]", highlight=False)

    def on_result(result: "StepResult") -> None:
        done = f"{result.computed} computed" if result.computed else "up to date"
        terminal.print(f"[green]✓[/] {result.step.title:<40} {done:>14}  {result.seconds:6.1f} s", highlight=False)
        for check in result.failed_checks:
            terminal.print(f"  [yellow]![/] {escape(one_line(check, _CHECK_WIDTH))}", highlight=False, soft_wrap=True)

    def on_wait(holders: str) -> None:
        terminal.print(f"[yellow]waiting for the model: {escape(holders)}[/]", highlight=False)

    def on_estimate(found: "Estimate") -> None:
        terminal.print(f"[dim]{escape(found.line())}[/]", highlight=False, soft_wrap=True)

    whole = steps is None  # the estimate is of a whole run
    listener = Listener() if quiet else Listener(on_step, on_result, on_wait, on_estimate if whole else None)
    shown = nullcontext() if quiet or terminal.is_terminal else heartbeat
    with shown, interrupts_at_safe_points() as interrupts, instance_of(settings) as instance:
        results = run_pipeline(
            loaded.project,
            loaded.definitions,
            instance,
            targets=targets,
            steps=steps,
            listener=listener._replace(on_run=interrupts.raise_pending),
        )
    return loaded, results


# -- printing: everything that a command prints goes through one of these -----------------------------------------


def say(message: str = "", fg: str | None = None, err: bool = False) -> None:
    """Print a message, in a colour where one is given."""
    typer.secho(visible(message), fg=fg, err=err)


def console(err: bool = False) -> "Console":
    """A Rich console: what is printed on it has to be `Text`, or escaped, where it may come from data."""
    from rich.console import Console

    return Console(stderr=True) if err else Console(width=None if sys.stdout.isatty() else 140)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table on the terminal; numbers with four digits."""
    from rich.table import Table
    from rich.text import Text

    def shown(cell: Any) -> Text:
        if isinstance(cell, Text):
            return cell
        # Text, not str: brackets in data are no markup.
        return Text("" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else visible(str(cell)))

    table = Table(title=shown(title) if title else None, title_justify="left")
    for column in columns:
        table.add_column(shown(column))
    for row in rows:
        table.add_row(*map(shown, row))
    console().print(table)


def print_intake(intake: "Intake") -> None:
    """What became of the records: a table, the most frequent reasons, and what else is to be known."""
    from prism_assets.corpus.intake import COLUMNS, SHOW_REJECTS

    if intake.parts:
        print_table(COLUMNS, [part.row() for part in intake.parts], title="What was given, and what became of it")
    for name, reason, count in intake.reasons[:_SHOWN_REASONS]:
        say(f"  {count:,} of {name} rejected: {one_line(reason, _CHECK_WIDTH)}")
    more = sum(count for *_, count in intake.reasons[_SHOWN_REASONS:])
    if more:
        say(f"  {more:,} more rejected for other reasons")
    if intake.reasons:
        say(f"  Which they are: {SHOW_REJECTS}")
    notes = intake.notes()
    for note in notes[:_SHOWN_REASONS]:
        say(f"  {one_line(note, _CHECK_WIDTH)}")
    if len(notes) > _SHOWN_REASONS:
        say(f"  and {len(notes) - _SHOWN_REASONS:,} more: prism doctor --json")


def print_files(files: "Sequence[HandedOut]") -> None:
    """Where the rows of each selection are. On lines of their own: a table would break long paths."""
    say("Rows (JSON Lines, ready for training; Parquet beside them):")
    for one in files:
        say(f"  {one.target}/{one.strategy}: {one.rows:,} {one.what}, {one.completion_tokens:,} completion tokens")
        say(f"    {one.json_lines}")


def short(value: Any, width: int = 48) -> Any:
    """A text on one line of at most `width` characters; anything else as it is."""
    return one_line(value, width) if isinstance(value, str) else value


def print_json(value: Any) -> None:
    """Strict JSON: what it has no form for becomes text, and numbers that are not finite become null."""
    print(in_json(json.dumps(_jsonable(value), ensure_ascii=False)))


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one) for one in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if isinstance(value, str | int | None) else str(value)
