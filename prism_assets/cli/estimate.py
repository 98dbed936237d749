"""`prism estimate`: what a run will take, before it begins."""

from typing import TYPE_CHECKING, Annotated

import typer

from prism_assets.cli.common import (
    AsJson,
    Config,
    Targets,
    app,
    expected_failures,
    known_targets,
    print_json,
    print_table,
    read_settings,
    say,
)

if TYPE_CHECKING:
    from prism_assets.ops.estimate import Estimate


@app.command()
def estimate(
    config: Config = None,
    target: Targets = None,
    seconds: Annotated[
        float, typer.Option(min=0.05, help="Seconds of each kind of pass that are measured on real rows.")
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """What `prism run` will take: rows and tokens, time of each stage, memory, disk, and records lost to max_length."""
    with expected_failures():
        settings = read_settings(config)
        known_targets(settings, target)
        from prism_assets.engines import open_stage
        from prism_assets.ops.estimate import estimate as estimated

        found = estimated(open_stage(settings), target, seconds=seconds)
        if as_json:
            print_json(found.data())
        else:
            _print(found)
        if found.problems:
            raise typer.Exit(2)


def _print(found: "Estimate") -> None:
    from prism_assets.ops.estimate import size_text, time_text

    pool = found.pool
    say(f"Pool: {found.pool_text()}.")
    if pool.pending:
        how = f"extrapolated by bytes from {pool.sampled:,}" if pool.extrapolated else f"from all {pool.sampled:,}"
        say(f"  {len(pool.pending):,} of {pool.files:,} files are not ingested yet: {how} records of them.")
    if round(pool.truncated):
        say(f"  {pool.truncated:,.0f} rows lose the start of their prompt to max_length {found.max_length}.")
    for file in found.files:
        if found.lost(file) and not file.problem:
            role = "examples" if file.kind == "target" else "eval"
            say(f"targets.{file.name}.{role}: {found.lost(file)}.")
    if found.measured is None:
        say("Everything is up to date.")
    else:
        rows = [
            [
                *(one.stage, f"{one.rows:,.0f}", f"{one.tokens:,.0f}", f"{one.new_tokens:,.0f}"),
                *(time_text(one.cpu_seconds), time_text(one.seconds)),
            ]
            for one in found.stages
        ]
        rows.append(["all", "", "", "", time_text(found.cpu_seconds), time_text(found.seconds)])
        if found.stages:
            print_table(["stage", "rows or parts", "tokens", "new tokens", "CPU time", "time, as busy as now"], rows)
        memory = found.measured.memory
        say(
            f"Memory ({memory.device}): {size_text(memory.expected)} at the peak, at least "
            f"{size_text(memory.smallest)}; {size_text(memory.allowed)} may be held."
        )
        say(f"Disk: {size_text(found.disk.total)} to be written; {size_text(found.disk.free)} are free.")
        if found.benchmarks:
            say("Benchmarks are not in the time.")
    for problem in found.problems:
        say(problem, fg="red", err=True)
