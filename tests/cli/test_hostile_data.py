"""Texts that act on what shows them, in records, ids, sources and names of files: in every output they are seen, and
none acts."""

import json
import os
import re

import pytest
from typer.testing import CliRunner

from conftest import make_rows, write_lines
from prism_assets.report.inlined import scripts

ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]")
# What a terminal obeys, what reorders and hides text, markup of Rich, Markdown and HTML.
PAYLOAD = (
    "\x1b[2J\x1b]8;;http://evil.example\x07 \x9b31m \x08 \u202egnp.exe\u202c \u200b\U000e0041 [bold red]rich[/] "
    "![i](http://evil.example/i.png) [l](http://evil.example) <img src=http://evil.example> "
    "</code><script>alert(1)</script>"
)
SEEN = "\\x1b[2J"  # how its beginning looks
FILE = "\x1b[2J\u202e[red]name[/]"


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    """A project whose every text from data is hostile, run to its report; and what the run printed."""
    project = make_project(
        tmp_path_factory.mktemp("hostile") / "project", strategies=["prism"], seeds=[0], training={"steps": 1}
    )
    for path in project.inbox.iterdir():
        path.unlink()
    rows = make_rows(20, 10)
    hostile = [
        {**row, "prompt": f"{row['prompt']}{PAYLOAD}"[-40:] if number % 2 else row["prompt"]}
        | {"id": f"{PAYLOAD}{number}", "source": PAYLOAD}
        for number, row in enumerate(rows)
    ]
    bad = [{PAYLOAD: 1}, {"prompt": "a", "completion": 1, "id": PAYLOAD}, f"{PAYLOAD} no json".replace("\n", "")]
    write_lines(project.inbox / f"{FILE}.jsonl", [*hostile, *bad])
    write_lines(project.inbox / f"{FILE}.txt", [])
    (project.inbox / f"{FILE}.jsonl.gz").write_bytes(b"no gzip")
    targets = [{**row, "id": PAYLOAD, "source": PAYLOAD} for row in make_rows(4, 100, "reverse")]
    write_lines(project.folder / "plain" / "target.jsonl", [*targets, {PAYLOAD: 1}])
    return project, prism(project, "run")


def prism(project, *arguments, status=0):
    """What a command prints on both streams."""
    from prism_assets.cli import app

    os.environ.pop("DAGSTER_HOME", None)
    done = CliRunner().invoke(app, [*arguments, "--config", str(project.config)])
    assert done.exit_code in (status, 0), done.output
    return done.output


COMMANDS = [
    ("query", "plain", "-k", "5"),
    ("query", "plain", "-k", "5", "--json"),
    ("sql", "SELECT record_id, source, prompt, excerpt FROM candidates FULL JOIN rejects ON false"),
    ("sql", "SELECT record_id, source, prompt, excerpt FROM candidates FULL JOIN rejects ON false", "--json"),
    ("sql", f'SELECT 1 AS "{PAYLOAD.replace(chr(34), "")}"'),
    ("sql", f'SELECT * FROM "{PAYLOAD}"'),
    ("doctor",),
    ("doctor", "--json"),
    ("report",),
    ("lineage", "selection[prism|plain]"),
    ("explain", PAYLOAD, "--target", "plain"),
    ("query", PAYLOAD),
    ("lineage", PAYLOAD),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: ascii(" ".join(arguments))[:50])
def test_no_command_prints_what_acts(project, arguments):
    output = prism(project[0], *arguments, status=2)
    assert output.strip() and not ACTS.search(output), ACTS.search(output)


def test_the_run_itself_and_an_explanation_show_it_escaped(project):
    project, printed = project
    assert not ACTS.search(printed) and "file_readable" in printed
    (found,) = json.loads(prism(project, "sql", "SELECT id FROM candidates LIMIT 1", "--json"))
    output = prism(project, "explain", found["id"], "--target", "plain", "--no-exact")
    assert SEEN in output and not ACTS.search(output)
    rich = prism(project, "sql", "SELECT '[bold red]rich[/]' AS \"[red]name[/]\"")
    assert "[bold red]rich[/]" in rich and "[red]name[/]" in rich


def test_json_holds_the_very_text(project):
    (found,) = json.loads(prism(project[0], "sql", "SELECT DISTINCT source FROM candidates", "--json"))
    assert found["source"] == PAYLOAD


def test_the_report_has_no_live_part(project):
    page = (project[0].settings.storage.report / "report.html").read_text(encoding="utf-8")
    assert not ACTS.search(page) and SEEN in page
    own = [f"<script>{text}</script>" for text in scripts()]
    for script in own:
        assert page.count(script) == 1
        page = page.replace(script, "")
    # What is left of scripts are blocks of data, and nothing in them can end one.
    blocks = re.findall(r'<script type="application/json" id="[^"]*">([^<&]*)</script>', page)
    assert len(blocks) == 1 and all(json.loads(block)["rows"] for block in blocks)
    assert page.count("<script") == len(blocks)
    assert not re.search(r"<(a href=.http|img src=.http)", page)


def test_cards_have_no_live_part(project, tmp_path):
    from markdown_it import MarkdownIt

    prism(project[0], "export", "plain", "--to", str(tmp_path / "out"))
    for card in ("adapter", "data"):
        text = (tmp_path / "out" / card / "README.md").read_text(encoding="utf-8")
        assert SEEN in text and not ACTS.search(text)
        parser = MarkdownIt("commonmark", {"html": True}).enable("table")
        tokens = [
            inner for token in parser.parse(text.split("---\n", 2)[2]) for inner in (token, *(token.children or ()))
        ]
        assert not {token.type for token in tokens} & {"link_open", "image", "html_inline", "html_block"}


def test_nothing_in_dagsters_metadata_and_logs_acts(project):
    import dagster as dg

    from prism_assets.ops.home import instance_of

    seen = False
    with instance_of(project[0].settings) as instance:
        for run in instance.get_runs():
            for event in instance.all_logs(run.run_id):
                shown = [event.user_message or "", event.message or ""]
                step = event.dagster_event
                if step is not None and step.event_type in (
                    dg.DagsterEventType.ASSET_MATERIALIZATION,
                    dg.DagsterEventType.ASSET_CHECK_EVALUATION,
                ):
                    data = step.event_specific_data
                    evaluated = getattr(data, "materialization", data)
                    for value in evaluated.metadata.values():
                        shown.append(str(getattr(value, "value", value)))
                        if isinstance(value, dg.MarkdownMetadataValue):
                            assert "evil.example" not in value.md_str or "`" in value.md_str
                for text in shown:
                    assert not ACTS.search(text), (event.message, text[:300])
                    seen |= SEEN in text
    assert seen
