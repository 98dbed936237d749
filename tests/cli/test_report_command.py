"""`prism report`: where the pages are, and what is said where there are none."""

import json
import webbrowser

import pytest
from typer.testing import CliRunner


def prism(project, *arguments):
    from prism_assets.cli import app

    return CliRunner().invoke(app, ["report", "--config", str(project.config), *arguments])


@pytest.fixture
def opened(monkeypatch):
    """The addresses that were opened."""
    found = []
    monkeypatch.setattr(webbrowser, "open", lambda address: found.append(address) or True)
    return found


def test_it_names_the_page_over_all_targets_and_that_of_each(two_versions, opened):
    done = prism(two_versions, "--json")
    pages = json.loads(done.output)
    assert list(pages) == ["all targets", "plain", "pairs"]
    lake = two_versions.lake
    assert pages["plain"] == str(lake.local(lake.require("report", "plain"), "report.html"))
    assert pages["all targets"] == str(two_versions.settings.storage.report / "report.html")
    assert pages["pairs"] in prism(two_versions).output.replace("\n", "") and opened == []


def test_it_opens_the_page_over_all_targets_or_that_of_one(two_versions, opened):
    pages = json.loads(prism(two_versions, "--json").output)
    assert prism(two_versions, "--open").exit_code == 0
    assert prism(two_versions, "--open", "--target", "pairs").exit_code == 0
    assert opened == [f"file://{pages['all targets']}", f"file://{pages['pairs']}"]


def test_without_a_browser_it_says_what_to_do(two_versions, monkeypatch):
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    done = prism(two_versions, "--open")
    assert done.exit_code == 0 and "No browser was found" in done.output


def test_before_a_run_it_says_what_makes_a_report(make_project, tmp_path):
    project = make_project(tmp_path / "project")
    done = prism(project)
    assert done.exit_code == 2 and "There is no report yet: `prism run` makes it" in done.output
    done = prism(project, "--target", "nope")
    assert done.exit_code == 2 and "names the targets plain" in done.output
