"""`prism init`: a commented prism.yaml."""

from pathlib import Path
from typing import Annotated

import typer

from prism_assets.cli.common import app, expected_failures, say
from prism_assets.errors import UserMistake


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("prism.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented prism.yaml."""
    with expected_failures():
        from prism_assets.ops.home import package_file

        if path.is_dir():
            path = path / "prism.yaml"
        if path.exists() and not force:
            raise UserMistake(f"{path} is there already: name another path, or use --force to overwrite it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(package_file("example.yaml").read_text(encoding="utf-8"), encoding="utf-8")
        say(f"Wrote {path}. Put candidates into its inbox, name your targets, then: prism run --config {path}")
