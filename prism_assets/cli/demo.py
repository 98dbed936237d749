"""`prism demo`: the whole pipeline on an embedded model and embedded data."""

import os
from pathlib import Path
from typing import Annotated

import typer

from prism_assets.cli.common import app, expected_failures, read_settings


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demo's data, lake and report go.")] = Path("runs/demo"),
) -> None:
    """Run the whole pipeline on an embedded model and embedded data."""
    with expected_failures():
        import yaml

        from prism_assets.cli.run import run_everything

        # The demo's matrices are so small that a second thread costs more than it brings.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        from prism_assets.demo.data import demo_settings, write_demo_data

        folder = folder.resolve()
        config = folder / "prism.yaml"
        if not config.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_demo_data(folder, seed=0)
            config.write_text(yaml.safe_dump(demo_settings(), sort_keys=False), encoding="utf-8")
        run_everything(read_settings(config))
