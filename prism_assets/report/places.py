"""Where the pages of reports are: as files, and in the UI."""

from pathlib import Path
from urllib.parse import quote

from prism_assets.engines import open_lake
from prism_assets.settings import Settings

PAGE, DATA = "report.html", "report.json"
# Below it `prism ui` serves the pages (ops/report_pages.py).
IN_THE_UI = "/prism/report/"


def link_in_the_ui(target: str) -> str:
    """Where `prism ui` serves the page of a target."""
    return IN_THE_UI + quote(target, safe="")


def report_pages(settings: Settings) -> dict[str, Path]:
    """The page over all targets under an empty name, and those of targets by name; only what is there."""
    lake = open_lake(settings)
    pages = {"": settings.storage.report / PAGE}
    for name in settings.targets:
        found = lake.head("report", name)
        if found is not None:
            pages[name] = lake.local(found, PAGE)
    return {name: page for name, page in pages.items() if page.is_file()}
