"""`prism report`: where the last reports are, and open one."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from prism_assets.cli.common import (
    AsJson,
    Config,
    app,
    expected_failures,
    known_targets,
    print_json,
    read_settings,
    say,
)
from prism_assets.errors import NotMadeYet


@app.command()
def report(
    target: Annotated[str | None, typer.Option("--target", "-t", help="The page of this target alone.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Where the last reports are: the page over all targets, and the page of each target."""
    with expected_failures():
        settings = read_settings(config)
        known_targets(settings, [target] if target else None)
        from prism_assets.report.places import report_pages

        pages = report_pages(settings)
        if target:
            pages = {name: page for name, page in pages.items() if name == target}
        if not pages:
            of = f" of {target}" if target else ""
            raise NotMadeYet(f"There is no report{of} yet: `prism run` makes it, after fine-tuning and evaluation.")
        if as_json:
            print_json({name or "all targets": str(page) for name, page in pages.items()})
        else:
            for name, page in pages.items():
                say(f"{name or 'all targets'}:  {page}")
        if open_page:
            _open(next(iter(pages.values())))


def _open(page: Path) -> None:
    if not webbrowser.open(page.resolve().as_uri()):
        say("No browser was found: open the file above in one, or copy it to a machine that has one.", err=True)
