"""What hand-written pages name exists: commands and options, settings, files, and the lines that read a lake."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from prism_assets.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
MADE = {ROOT / "docs" / "reference" / "commands.md"}
PAGES = sorted(
    {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")}
    - MADE
)
# What a `yaml` block may be beside a part of prism.yaml: a component.
OTHER_YAML = {"type", "attributes"}


def named(path):
    return path.relative_to(ROOT).as_posix()


def commands_of(text):
    """Every `prism …` of a code block, fenced or indented, or of code within a line."""
    lines = re.findall(r"^ {4}(.*)$", text, re.MULTILINE)
    lines += [
        line for block in re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()
    ]
    lines += re.findall(r"`(prism [^`]*)`", text)
    for line in lines:
        found = re.match(r"(?:[A-Z_]+=(?:'[^']*'|\S+) +)*(?:\.venv/bin/)?prism +(.*)", line)
        if found:
            yield found[1]


def test_commands_on_the_pages_exist_with_their_options():
    from prism_assets.cli import app

    known = {
        name: {option for parameter in one.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, one in typer.main.get_command(app).commands.items()
    }
    checked = 0
    for page in PAGES:
        for line in commands_of(page.read_text(encoding="utf-8")):
            words = shlex.split(line.replace("…", "x"), comments=True)
            if words[0].startswith("--") or not words[0].islower():
                continue  # prism --version, prism COMMAND
            assert words[0].rstrip(",.") in known, (named(page), line)
            for word in words[1:]:
                if word.startswith("-") and not word[1:2].isdigit():
                    assert word.partition("=")[0] in known[words[0]] | {"--help"}, (named(page), line)
            checked += 1
    assert checked > 60


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_settings_on_a_page_are_accepted(page):
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        content = yaml.safe_load(block)
        if content.keys() & OTHER_YAML:
            continue
        content.setdefault("targets", {"any": {"examples": "a.jsonl", "eval": "b.jsonl"}})
        Settings.model_validate(content)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_of_a_page_lead_to_files_of_the_repository(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^()\s#]+)[^()\s]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), (named(page), target)


def test_records_on_the_pages_are_read(tmp_path):
    from prism_assets.corpus.files import read_examples

    for page in PAGES:
        blocks = re.findall(r"^```json\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for place, line in enumerate("".join(blocks).splitlines()):
            path = tmp_path / f"{page.stem}-{place}.jsonl"
            path.write_text(line, encoding="utf-8")
            is_pair = {"rejected", "unsafe"} & json.loads(line).keys()
            examples, rejects = read_examples(path, "target" if is_pair else "candidate")
            assert list(rejects) == [] and len(examples) == 1, (named(page), line)
            assert bool(examples[0].rejected) == bool(is_pair)


def test_the_readme_is_short_and_names_the_command_of_the_tests():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert re.search(r"^ {4}make test\b", text, re.MULTILINE)


# -- a lake, read without prism-assets --------------------------------------------------------------------------------


@pytest.fixture
def selected(two_versions, tmp_path, monkeypatch):
    """A project as the page supposes it: the target `gsm8k`, results in `out/` and `prism-lake/`."""
    from prism_assets.catalog.sql import refresh
    from prism_assets.selection.handed_out import hand_out

    project = two_versions.copy(tmp_path / "project")
    hand_out(project.stage)
    (project.folder / "out" / "plain").rename(project.folder / "out" / "gsm8k")
    refresh(project.lake)
    monkeypatch.chdir(project.folder)
    return project


def lines_that_read_with(library):
    text = (ROOT / "docs" / "howto" / "read-the-lake.md").read_text(encoding="utf-8")
    return next(one for one in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if library in one)


def run_lines(library):
    space = {}
    exec(lines_that_read_with(f"import {library}"), space)
    return space


def test_three_lines_read_a_selection_in_pandas(selected):
    pytest.importorskip("pandas")
    space = run_lines("pandas")
    assert list(space["rows"]["rank"]) == list(range(1, 9))
    assert space["counts"].sum() == 8


def test_three_lines_read_a_selection_in_polars(selected):
    pytest.importorskip("polars")
    space = run_lines("polars")
    assert space["rows"]["rank"].to_list() == list(range(1, 9))
    assert space["counts"]["len"].sum() == 8


@pytest.mark.parametrize(("library", "method"), [("pandas", "df"), ("polars", "pl")])
def test_three_lines_read_a_table_of_the_lake(selected, library, method):
    pytest.importorskip(library)
    space = {}
    exec(lines_that_read_with(f"target = 'gsm8k'\").{method}()").replace("gsm8k", "plain"), space)
    assert type(space["scores"]).__module__.partition(".")[0] == library
    assert list(space["scores"]["target"]) == ["plain"] * len(space["scores"]) and len(space["scores"]) == 32


def test_three_lines_read_the_views_in_duckdb(selected):
    pytest.importorskip("pandas")
    counts = run_lines("duckdb")["counts"]
    assert set(counts["strategy"]) == {"prism", "uniform", "less", "random"}
    assert set(counts["target"]) == {"plain", "pairs"} and set(counts["rows"]) == {8}


def test_a_stage_reads_the_weights(selected):
    pytest.importorskip("pandas")
    space = {}
    exec(lines_that_read_with("open_stage").replace("gsm8k", "plain"), space)
    assert space["weights"]["prism"].sum() == pytest.approx(1)


def test_the_query_of_the_page_finds_the_row_itself_first(selected):
    import duckdb

    text = (ROOT / "docs" / "howto" / "read-the-lake.md").read_text(encoding="utf-8")
    query = re.search(r"^```sql\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    with duckdb.connect("prism-lake/prism.duckdb", read_only=True) as lake:
        ((one,),) = lake.sql("SELECT id FROM features WHERE refused IS NULL LIMIT 1").fetchall()
        found = lake.sql(query.replace("…", one)).fetchall()
    assert found[0][0] == one and len(found) == 10
