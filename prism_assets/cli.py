"""`prism`: a thin door to the same definitions that Dagster loads.

Exit status: 0 done, 1 the work failed, 2 the user must change something. Heavy imports live inside the commands:
`prism --help` needs neither dagster nor torch.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import dagster as dg

    from prism_assets import pipeline
    from prism_assets.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pick the SFT data worth fine-tuning on, with influence functions weighted by the model's preference.",
)

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="The prism.yaml to use (else PRISM_CONFIG, else ./prism.yaml).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """The console script. Every expected failure leaves one clear message and an exit status."""
    app()


def _fail(message: str, status: int) -> typer.Exit:
    typer.secho(str(message), fg="red", err=True)
    return typer.Exit(status)


@contextmanager
def _expected_failures() -> Iterator[None]:
    """Turn what users can mend, or what a step says of itself, into a message and a status."""
    from prism_assets.settings import SettingsError

    try:
        yield
    except SettingsError as error:
        raise _fail(str(error), 2) from error
    except KeyboardInterrupt as error:
        raise _fail("Interrupted. What was finished is kept; run again to go on.", 1) from error
    except typer.Exit:
        raise
    except Exception as error:
        if type(error).__name__ in _USER_ERRORS:
            raise _fail(str(error), 2) from error
        if type(error).__name__ in _WORK_ERRORS:
            raise _fail(str(error), 1) from error
        raise


_CHECK_WIDTH = 240

# By name, so that catching them imports nothing.
_USER_ERRORS = {
    "UserMistake",
    *("ModelError", "UnsupportedModelError", "UnusableTokenizer"),
    *("CannotExplain", "CannotExport", "QueryRefused", "UnknownThing", "NotMadeYet", "UnusableBenchmark"),
}
_WORK_ERRORS = {"PipelineError", "LakeError", "DamagedArtifact", "DamagedSegment", "Failure"}


def _settings(config: Path | None) -> "Settings":
    from prism_assets.settings import config_path, load_settings

    settings = load_settings(config)
    # Everything started from here (Dagster's own processes too) reads the same file.
    os.environ["PRISM_CONFIG"] = str(config_path(config))
    return settings


def _definitions() -> "dg.Definitions":
    """The code location itself, as Dagster loads it."""
    import importlib.util

    from prism_assets.pipeline import project_file

    spec = importlib.util.spec_from_file_location("prism_definitions", project_file("definitions.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.defs


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def shown(cell: Any) -> Text:
        if isinstance(cell, Text):
            return cell
        # Text, not str: brackets in data are no markup.
        return Text("" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell))

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(shown, row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("prism.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented prism.yaml."""
    if path.is_dir():
        path = path / "prism.yaml"
    if path.exists() and not force:
        raise _fail(f"{path} is there already: name another path, or use --force to overwrite it.", 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Path(__file__).with_name("example.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(f"Wrote {path}. Put candidates into its inbox, name your targets, then: prism run --config {path}")


@app.command()
def run(
    config: Config = None,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Only this target (repeatable).")] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="tensorboard, mlflow or wandb (repeatable): gets the losses of what is trained in this run."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring everything up to date: from the files in the inbox to the report. What exists is not computed again."""
    with _expected_failures():
        if report_to:
            # An override like any other: definitions.py reads the same settings.
            os.environ["PRISM_TRAINING__REPORT_TO"] = json.dumps(report_to)
        settings = _settings(config)
        _known_targets(settings, target)
        _run(settings, target, as_json)


def _walk(
    settings: "Settings", targets: Sequence[str] | None, steps: "Sequence[pipeline.Step] | None" = None
) -> "list[pipeline.StepResult]":
    """Run the steps (by default all of `prism run`) and say what each came to."""
    from rich.console import Console
    from rich.markup import escape

    from prism_assets import pipeline

    console = Console(stderr=True)
    os.environ["DAGSTER_HOME"] = str(pipeline.dagster_home(settings))
    definitions = _definitions()

    def on_result(result: "pipeline.StepResult") -> None:
        done = f"{result.computed} computed" if result.computed else "up to date"
        console.print(f"[green]✓[/] {result.step.title:<40} {done:>14}  {result.seconds:6.1f} s", highlight=False)
        for check in result.failed_checks:
            text = check if len(check) <= _CHECK_WIDTH else check[: _CHECK_WIDTH - 1] + "…"
            console.print(f"  [yellow]![/] {escape(text)}", highlight=False, soft_wrap=True)

    with pipeline.instance_of(settings) as instance:
        return pipeline.run_pipeline(
            settings,
            definitions,
            instance,
            on_step=lambda step: console.print(f"[dim]… {step.title}[/]", highlight=False) if console.is_terminal else None,
            on_result=on_result,
            on_wait=lambda holders: console.print(f"[yellow]waiting for the model: {escape(holders)}[/]", highlight=False),
            targets=targets,
            steps=pipeline.STEPS if steps is None else steps,
        )


def _run(settings: "Settings", targets: Sequence[str] | None = None, as_json: bool = False) -> None:
    results = _walk(settings, targets)
    report = settings.storage.report / "report.json"
    data = json.loads(report.read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps({"steps": [{"step": r.step.title, "computed": r.computed, "seconds": r.seconds, "runs": r.run_ids}
                                    for r in results], "report": str(report), "targets": data["targets"]}))  # fmt: skip
        return
    from prism_assets.evaluation.report import comparison_table

    header, *rows = comparison_table(data)
    _print_table(header, rows, title="Held-out results (mean ± standard deviation over seeds)")
    typer.echo("\nSelected data (JSON Lines, ready for training):")
    for name, part in data["targets"].items():
        for strategy, entry in part["strategies"].items():
            typer.echo(f"  {name}/{strategy}: {entry['selected_jsonl']}")
    config = os.environ["PRISM_CONFIG"]
    typer.echo(f"\nReport:  {report.with_suffix('.html')}")
    typer.echo(f"Browse the same history in the Dagster UI:  prism ui --config {config}")


@app.command()
def experiment(
    config: Config = None,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Only this target (repeatable).")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the strategies over several splits and seeds, and say what follows. Goes on where it was stopped."""
    with _expected_failures():
        settings = _settings(config)
        _known_targets(settings, target)
        from prism_assets.pipeline import EXPERIMENT_STEPS

        results = _walk(settings, target, EXPERIMENT_STEPS)
        page = settings.storage.report / "experiment.html"
        found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["targets"]
        found = {name: one for name, one in found.items() if not target or name in target}
        if as_json:
            _print_json({"computed": results[-1].computed, "page": str(page), "targets": found})
            return
        from prism_assets.experiment.summary import table

        for name, one in found.items():
            header, *rows = table({name: one})
            # The interval of a difference on a line of its own.
            shown = [[cell.replace(" [", "\n[") for cell in row[1:]] for row in rows]
            title = f"{name}: mean ± standard deviation over {one['unit']}s; differences in target preference, 95% intervals"
            _print_table(header[1:], shown, title=title)
            for sentence in one["verdict"]:
                typer.echo(f"  {sentence}")
            typer.echo()
        typer.echo(f"Page:  {page}")


def _known_targets(settings: "Settings", targets: Sequence[str] | None) -> None:
    unknown = [name for name in targets or () if name not in settings.targets]
    if unknown:
        raise _fail(f"--target {unknown[0]}: prism.yaml names {', '.join(settings.targets)}.", 2)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demo's data, lake and report go.")] = Path("runs/demo"),
) -> None:
    """Run the whole pipeline on an embedded model and embedded data."""
    with _expected_failures():
        import yaml

        # The demo's matrices are so small that a second thread costs more than it brings.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        from prism_assets.demo.data import demo_settings, write_demo_data

        folder = folder.resolve()
        config = folder / "prism.yaml"
        if not config.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_demo_data(folder, seed=0)
            config.write_text(yaml.safe_dump(demo_settings(folder), sort_keys=False), encoding="utf-8")
        _run(_settings(config))


@app.command()
def trust(
    target: Annotated[str, typer.Argument(help="A target of prism.yaml.")],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Whether a target's weights, direction and scores can be trusted: measured where it was not yet, and in words."""
    with _expected_failures():
        settings = _settings(config)
        if target not in settings.targets:
            raise _fail(f"{target}: prism.yaml names the targets {', '.join(settings.targets)}.", 2)
        from prism_assets import pipeline

        os.environ["DAGSTER_HOME"] = str(pipeline.dagster_home(settings))
        definitions = _definitions()
        with pipeline.instance_of(settings) as instance:
            pipeline.run_pipeline(settings, definitions, instance, targets=[target], steps=[pipeline.TRUST])
        from prism_assets.trust.assets import trust_of
        from prism_assets.trust.verdict import findings

        notes = trust_of(settings, definitions.resources["lake"], definitions.resources["language_model"], target)
        found = findings(notes)
        if as_json:
            _print_json({"target": target, "findings": [one._asdict() for one in found], "measurements": notes})
            return
        marks = {True: "holds", False: "does not hold", None: "not measured"}
        rows = [[one.question, marks[one.passed], one.sentence] for one in found]
        _print_table(["question", "", "what the measurements say"], rows, title=f"Trust in {target}")
        typer.echo("The report shows this from the next `prism run` on.")


@app.command()
def query(
    target: Annotated[str, typer.Argument(help="A target of prism.yaml.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many candidates.")] = 10,
    strategy: Annotated[str, typer.Option(help="prism, uniform or less.")] = "prism",
    version: Annotated[str | None, typer.Option(help="An older feature version.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Score four times k rows again without the sketch; needs the model.")] = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """The k candidates of highest influence on a target: the index answers for the target's direction."""
    with _expected_failures():
        settings = _settings(config)
        if target not in settings.targets:
            raise _fail(f"{target}: prism.yaml names the targets {', '.join(settings.targets)}.", 2)
        resources = _definitions().resources
        from prism_assets.selection.assets import query_index

        if version and exact:
            raise _fail("--exact needs the model of today's version: leave out --version, or --exact.", 2)
        version = _full_version(resources["lake"], version) if version else None
        rows = query_index(
            settings,
            resources["lake"],
            resources["language_model"],
            resources["vector_store"],
            target=target,
            strategy=strategy,
            k=k,
            version=version,
            rerank=4.0 if exact else 0.0,
        )
        if as_json:
            print(json.dumps(rows, ensure_ascii=False))
            return
        columns = ["rank", "score", "source", "prompt", "completion", "shard", "id"]
        shown = [[_short(row[name]) for name in columns] for row in rows]
        _print_table(columns, shown, title=f"{strategy}: candidates of highest influence on {target}")


def _full_version(lake: Any, beginning: str) -> str:
    """The one feature version of the lake that begins so."""
    from prism_assets.housekeeping import feature_versions

    known = [one.name for one in feature_versions(lake)]
    found = [name for name in known if name.startswith(beginning)]
    if len(found) != 1:
        which = "may be any of" if found else "is not in the lake, which has"
        raise _fail(f"--version {beginning} {which}: {', '.join(found or known) or 'no feature version yet'}.", 2)
    return found[0]


def _short(value: Any, width: int = 48) -> Any:
    if not isinstance(value, str):
        return value
    text = " ".join(value.split())
    return text if len(text) <= width else text[: width - 1] + "…"


@app.command()
def ui(
    config: Config = None,
    port: Annotated[int, typer.Option(help="Port of the webserver.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Open the Dagster UI and daemon on this project: runs, lineage, plots, checks, automation."""
    with _expected_failures():
        settings = _settings(config)
        from prism_assets.pipeline import dagster_home, project_file

        os.environ["DAGSTER_HOME"] = str(dagster_home(settings))
        workspace = project_file("workspace.yaml")
        dagster = Path(sys.executable).with_name("dagster")
        typer.echo(f"Dagster UI on http://{host}:{port} (DAGSTER_HOME={os.environ['DAGSTER_HOME']}); stop it with Ctrl-C.")
        os.chdir(workspace.parent)
        os.execv(dagster, [str(dagster), "dev", "-w", str(workspace), "-p", str(port), "-h", host])


@app.command()
def doctor(config: Config = None, as_json: AsJson = False) -> None:
    """What this installation has: versions, device, model, inbox, and what is stale."""
    with _expected_failures():
        settings = _settings(config)
        from prism_assets.doctor import examine

        resources = _definitions().resources
        findings = examine(settings, resources["lake"], resources["language_model"])
        if as_json:
            print(json.dumps([finding._asdict() for finding in findings]))
        else:
            from rich.text import Text

            marks = {"ok": Text("✓", "green"), "note": Text("•", "yellow"), "problem": Text("✗", "red")}
            _print_table(["", "what", "found"], [[marks[f.state], f.what, f.found] for f in findings])
        if any(finding.state == "problem" for finding in findings):
            raise typer.Exit(2)


@app.command()
def explain(
    example: Annotated[str, typer.Argument(help="A candidate: its id (4 digits or more of it) or its record id.")],
    target: Annotated[str, typer.Option("--target", "-t", help="A target of prism.yaml.")],
    strategy: Annotated[str, typer.Option(help="prism, uniform or less.")] = "prism",
    exact: Annotated[
        bool | None, typer.Option("--exact/--no-exact", help="Measure the sketch's error; needs the model.")
    ] = None,
    neighbours: Annotated[int, typer.Option(min=0, help="How many nearest neighbours.")] = 5,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Why a candidate stands where it stands: its score by targets, its ranks, its neighbours, earlier versions."""
    with _expected_failures():
        settings = _settings(config)
        if target not in settings.targets:
            raise _fail(f"--target {target}: prism.yaml names {', '.join(settings.targets)}.", 2)
        resources = _definitions().resources
        from prism_assets.explanation import Explainer

        engines = resources["lake"], resources["language_model"], resources["vector_store"]
        with Explainer(settings, *engines, target=target, strategy=strategy, exact=exact) as explainer:
            found = explainer.explain(example, neighbours)
        if as_json:
            _print_json(found.as_dict())
            return
        _print_explanation(found)


def _print_explanation(found: Any) -> None:
    typer.echo(f"{found.id}: {_short(found.prompt, 60)} → {_short(found.completion, 60)}")
    typer.echo(f"{found.shard}, row {found.row} (line {found.line} of its file); feature version {found.version}")
    for note in found.notes:
        typer.echo(note)
    exact = f"exact score {found.exact_score:.4g}" if found.exact_score is not None else f"no exact score: {found.why_not_exact}"
    role = "makes the shortlist that exact scores rank" if found.reranked else "ranks"
    typer.echo(f"score {found.score:.4g}, from the sketch, which {role}; {exact}")
    _print_table(
        ["target", "weight", "influence", "contribution"],
        [[_short(what, 72), *numbers] for what, *numbers in found.score_rows(limit=20)],
        title=f"{'Score' if found.exact_score is None else 'Exact score'} for {found.target} under {found.strategy}, by targets",
    )
    marks = {True: "yes", False: "no", None: None}
    ranks = [[one.strategy, one.rank, one.of, one.score, one.by, marks[one.selected]] for one in found.ranks]
    _print_table(["strategy", "rank", "of", "score", "by", "selected"], ranks, title="Rank under each strategy")
    columns = ["similarity", "source", "prompt", "completion", "id"]
    near = [[_short(getattr(one, name)) for name in columns] for one in found.neighbours]
    _print_table(columns, near, title="Nearest in gradient space")
    if found.earlier:
        columns = ["version", "used", "rank", "of", "score", "note"]
        earlier = [[getattr(one, name) for name in columns] for one in found.earlier]
        _print_table(columns, earlier, title="In other feature versions")


@app.command()
def export(
    target: Annotated[str, typer.Argument(help="A target of prism.yaml.")],
    to: Annotated[Path, typer.Option("--to", help="A folder; adapter/ and data/ are written into it.")],
    strategy: Annotated[str, typer.Option(help="A strategy of prism.yaml.")] = "prism",
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier export wrote there.")] = False,
    config: Config = None,
) -> None:
    """Write the first seed's adapter and the data it was trained on, each with a card, to hand on."""
    with _expected_failures():
        settings = _settings(config)
        for name, known in ((target, settings.targets), (strategy, settings.strategies)):
            if name not in known:
                raise _fail(f"{name}: prism.yaml names {', '.join(known)}.", 2)
        lake = _definitions().resources["lake"]
        from prism_assets.export import export as write_export

        adapter, data = write_export(settings, lake, target, strategy, to, force=force)
        typer.echo(f"Adapter: {adapter}  (peft: PeftModel.from_pretrained(base, {str(adapter)!r}))")
        typer.echo(f"Data:    {data}  (datasets: load_dataset({str(data)!r}, split='train'))")


@app.command()
def lineage(
    thing: Annotated[
        str,
        typer.Argument(help="A fingerprint (4 digits or more), a path, table\\[partition] such as selection\\[prism|gsm8k], or a shard key."),
    ],
    everything: Annotated[bool, typer.Option("--all", help="Draw also the tail of long lists.")] = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """What an artefact was made from, all the way up: fingerprints, settings, stage versions, Dagster runs."""
    with _expected_failures():
        settings = _settings(config)
        from prism_assets.lineage import draw, find_artifact, trace
        from resources.lake import Lake

        lake = Lake(root=str(settings.storage.root))
        traced = trace(lake, find_artifact(lake, thing))
        if as_json:
            _print_json(traced)
            return
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 140).print(draw(traced, everything))


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One SELECT; `DESCRIBE candidates` and `SHOW ALL TABLES` work too.")],
    limit: Annotated[int, typer.Option(min=0, help="Rows printed at most; 0 prints all.")] = 100,
    parameter: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="NAME=VALUE for $NAME in the query (repeatable).")
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Ask the lake in SQL: candidates, rejects, features, weights, scores, selections, evaluations, artifacts, lineage."""
    with _expected_failures():
        settings = _settings(config)
        values = dict(one.partition("=")[::2] for one in parameter or ())
        import duckdb

        from prism_assets import catalog
        from resources.lake import Lake

        lake = Lake(root=str(settings.storage.root))
        path = catalog.refresh(lake)
        with duckdb.connect(str(path), read_only=True) as connection:
            catalog.confine(connection, lake)
            answer = catalog.ask(connection, query, limit, values)
        if as_json:
            _print_json([dict(zip(answer.columns, row, strict=True)) for row in answer.rows])
        else:
            _print_table(answer.columns, [[_short(cell) for cell in row] for row in answer.rows])
        if answer.more:
            typer.secho(f"There are more than {limit} rows; --limit prints more.", fg="yellow", err=True)


@app.command()
def gc(
    keep: Annotated[int, typer.Option(min=0, help="Older feature versions to keep beside the current one.")] = 1,
    min_age: Annotated[str, typer.Option(help="Spare what is younger: 90s, 30m, 1h, 2d.")] = "1h",
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, it is only shown.")] = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Show, and with --yes remove, what no head and no kept feature version needs."""
    with _expected_failures():
        settings = _settings(config)
        age = _seconds(min_age)
        resources = _definitions().resources
        from prism_assets import catalog, housekeeping, pipeline

        lake = resources["lake"]
        os.environ["DAGSTER_HOME"] = str(pipeline.dagster_home(settings))
        with pipeline.instance_of(settings) as instance:
            running = housekeeping.runs_in_progress(instance)
        today = housekeeping.what_is_current(settings, lake, resources["language_model"])
        since = min((run.since for run in running), default=None)
        plan = housekeeping.plan(lake, **today._asdict(), keep=keep, min_age=age, running_since=since)
        removed = housekeeping.collect(lake, plan) if yes else {}
        if yes:
            catalog.refresh(lake)
        if as_json:
            _print_json(housekeeping.summary(plan, removed if yes else None, running))
            return
        for run in running:
            typer.secho(f"Run {run.run_id} is in progress: what it may need is spared.", fg="yellow", err=True)
        tables = removed if yes else plan.by_table()
        if tables:
            rows = [[table, count, f"{size / 2**20:,.2f}"] for table, (count, size) in tables.items()]
            _print_table(["table", "artefacts", "MiB"], rows, title="Removed" if yes else "Not needed")
        total = sum(size for _, size in tables.values()) / 2**20
        typer.echo(f"{total:,.2f} MiB {'freed.' if yes else 'can be freed; `prism gc --yes` frees them.' if tables else 'can be freed.'}")
        typer.echo(f"Feature versions that stay: {', '.join(plan.kept_versions) or 'none'}.")
        if plan.dropped_versions:
            typer.echo(f"Feature versions that {'went' if yes else 'would go'}: {', '.join(plan.dropped_versions)}.")
        if plan.spared_for_age:
            typer.echo(f"{plan.spared_for_age} more artefacts are not needed but younger than {min_age}.")


def _seconds(text: str) -> float:
    """Seconds of `90s`, `30m`, `1h`, `2d`."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        return float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
    except ValueError as error:
        raise _fail(f"--min-age {text}: write 90s, 30m, 1h or 2d.", 2) from error


def _print_json(value: Any) -> None:
    """Strict JSON: what it has no form for becomes text, and numbers that are not finite become null."""
    print(json.dumps(_jsonable(value), ensure_ascii=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one) for one in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if isinstance(value, str | int | None) else str(value)
