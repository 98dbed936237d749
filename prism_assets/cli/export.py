"""`prism export`: an adapter and its data, to share; or what was selected, for another trainer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prism_assets.cli.common import Config, app, expected_failures, load_project, read_settings, say
from prism_assets.errors import UnknownThing
from prism_assets.export.formats.names import FormatName

if TYPE_CHECKING:
    from prism_assets.stage import Stage


@app.command()
def export(
    target: Annotated[str, typer.Argument(help="A target of prism.yaml.")],
    to: Annotated[Path, typer.Option("--to", help="A folder; adapter/ and data/, or FORMAT/, are written into it.")],
    strategy: Annotated[str, typer.Option(help="A strategy of prism.yaml.")] = "prism",
    format_name: Annotated[
        FormatName | None,
        typer.Option("--format", "-f", help="Write what was selected for this tool; no adapter is needed."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier export wrote there.")] = False,
    config: Config = None,
) -> None:
    """Write the first seed's adapter and the data it was trained on, each with a card, to share.

    With --format it is what was selected instead, as another trainer reads it, with a configuration that runs.
    """
    with expected_failures():
        settings = read_settings(config)
        for name, known in ((target, settings.targets), (strategy, settings.strategies)):
            if name not in known:
                raise UnknownThing(f"{name}: prism.yaml names {', '.join(known)}.")
        stage = load_project(settings).stage
        if format_name is not None:
            _hand_over(stage, target, strategy, format_name, to, force)
            return
        from prism_assets.export.export import export as write_export

        adapter, data = write_export(stage, target, strategy, to, force=force)
        say(f"Adapter: {adapter}  (peft: PeftModel.from_pretrained(base, {str(adapter)!r}))")
        say(f"Data:    {data}  (datasets: load_dataset({str(data)!r}, split='train'))")


def _hand_over(stage: "Stage", target: str, strategy: str, format_name: FormatName, folder: Path, force: bool) -> None:
    from prism_assets.export.formats.hand_over import hand_over
    from prism_assets.ops.stale import newer_than_shown
    from prism_assets.selection.strategies import STRATEGIES

    found = hand_over(stage, target, strategy, format_name, folder, force=force)
    say(f"{found.rows:,} rows ({found.what}), {found.completion_tokens:,} tokens with loss: {found.folder}")
    say(f"How they are used: {found.folder / 'README.md'}")
    waiting = newer_than_shown(stage, target, STRATEGIES[strategy])
    if waiting:
        say(
            f"This is the last selection that is whole; something newer waits ({'; '.join(waiting)}): "
            f"`prism select --target {target}` takes it in."
        )
