"""`prism export`: an adapter and its data, to share."""

from pathlib import Path
from typing import Annotated

import typer

from prism_assets.cli.common import Config, app, expected_failures, load_project, read_settings, say
from prism_assets.errors import UnknownThing


@app.command()
def export(
    target: Annotated[str, typer.Argument(help="A target of prism.yaml.")],
    to: Annotated[Path, typer.Option("--to", help="A folder; adapter/ and data/ are written into it.")],
    strategy: Annotated[str, typer.Option(help="A strategy of prism.yaml.")] = "prism",
    force: Annotated[bool, typer.Option("--force", help="Replace what an earlier export wrote there.")] = False,
    config: Config = None,
) -> None:
    """Write the first seed's adapter and the data it was trained on, each with a card, to share."""
    with expected_failures():
        settings = read_settings(config)
        for name, known in ((target, settings.targets), (strategy, settings.strategies)):
            if name not in known:
                raise UnknownThing(f"{name}: prism.yaml names {', '.join(known)}.")
        stage = load_project(settings).stage
        from prism_assets.export.export import export as write_export

        adapter, data = write_export(stage, target, strategy, to, force=force)
        say(f"Adapter: {adapter}  (peft: PeftModel.from_pretrained(base, {str(adapter)!r}))")
        say(f"Data:    {data}  (datasets: load_dataset({str(data)!r}, split='train'))")
