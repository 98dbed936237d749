"""The pages of docs/ that are made from the code: they are what the code says today, and say all of it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from prism_assets.pages import all_pages
from prism_assets.pages.markdown import codes, page, prose, table

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def pages():
    return all_pages()


def test_the_committed_pages_are_what_the_code_says(pages):
    for place, text in pages.items():
        committed = (DOCS / place).read_text(encoding="utf-8")
        assert committed == text, f"docs/{place} is old: python -m prism_assets.pages writes it"


def test_no_page_of_the_reference_is_left_over(pages):
    made = {place for place in pages if place.startswith("reference/")}
    assert {f"reference/{one.name}" for one in (DOCS / "reference").glob("*.md")} == made


def test_every_command_and_option_of_the_help_is_on_the_page(pages, monkeypatch):
    from typer.testing import CliRunner

    from prism_assets.cli import app

    monkeypatch.setenv("COLUMNS", "200")
    text, runner = pages["reference/commands.md"], CliRunner()
    listed = re.findall(r"^[│ ]+([a-z]+) {2,}\S", runner.invoke(app, ["--help"]).output, re.MULTILINE)
    assert {"init", "select", "gc"} <= set(listed)
    for command in listed:
        section = re.search(rf"^## `prism {command}`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section, command
        helped = runner.invoke(app, [command, "--help"]).output
        for option in set(re.findall(r"^[│ *]+(--[a-z-]+)", helped, re.MULTILINE)) - {"--help"}:
            assert option in section[1], (command, option)


def test_every_asset_check_job_schedule_and_sensor_is_on_the_page(pages, make_project, tmp_path):
    definitions = make_project(tmp_path / "project").definitions
    graph, repository = definitions.resolve_asset_graph(), definitions.get_repository_def()
    names = {key.path[-1] for key in graph.get_all_asset_keys()}
    names |= {key.name for key in graph.asset_check_keys}
    names |= {one.name for one in repository.schedule_defs} | {one.name for one in repository.sensor_defs}
    names |= {one.name for one in repository.get_all_jobs() if not one.name.startswith("__")}
    assert len(names) > 40
    assert {one for one in names if f"`{one}`" not in pages["reference/assets.md"]} == set()


def test_every_table_view_and_promised_column_is_on_the_page(pages):
    from prism_assets.catalog.views import VIEWS
    from prism_assets.tables import tables

    text = pages["reference/tables.md"]
    assert {name for name in VIEWS if not re.search(rf"^\| `{name}` \| \S", text, re.MULTILINE)} == set()
    for entry in tables():
        section = re.search(rf"^### `{entry.name}`\n\n(.*?)$", text, re.MULTILINE)
        assert section, entry.name
        for name, kind in (entry.columns or {}).items():
            assert f"`{name}` {kind}" in section[1]


def test_a_module_prints_its_page(pages):
    printed = subprocess.run(
        [sys.executable, "-m", "prism_assets.pages.strategies"], capture_output=True, text=True, check=True
    )
    assert printed.stdout == pages["reference/strategies.md"]


def test_pieces_of_markdown():
    assert table(["a", "b"], [["x|y", ""]]) == "| a | b |\n| --- | --- |\n| x\\|y |  |\n"
    assert codes(["a", "b"]) == "`a`, `b`" and codes([]) == "–"
    assert prose("One\n    line, x < y.\n\n    `<name>` stays.") == "One line, x &lt; y.\n\n`<name>` stays."
    assert page("\na\n", "", "b") == "a\n\nb\n"
