"""No character of data acts on a terminal, a log, a page or a card, and nothing gets out past `prism_assets.text`."""

import ast
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_assets.errors import UnreadableFile
from prism_assets.text import as_cell, as_code, in_json, one_line, visible

ROOT = Path(__file__).resolve().parents[1]
# By Unicode's own categories: controls, formats, surrogates, separators of lines; and letters without a glyph.
LETTERS_WITHOUT_A_GLYPH = set("\u115f\u1160\u3164\uffa0")
SIGNS_OF_CATEGORY_FORMAT = set(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
)  # digits of Arabic are written over them: they are seen


def acts(character: str) -> bool:
    if character in "\n\t" or character in SIGNS_OF_CATEGORY_FORMAT or "\U00013430" <= character <= "\U0001343f":
        return False  # and what joins hieroglyphs
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in LETTERS_WITHOUT_A_GLYPH


def test_every_character_of_unicode_that_acts_or_hides_is_escaped_and_no_letter_is():
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        if acts(character):
            assert visible(character).startswith("\\"), hex(number)
        elif unicodedata.category(character)[0] in "LNPS":
            assert visible(character) == character, hex(number)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]8;;http://evil.example\x07click\x1b]8;;\x07", "\\x1b]8;;http://evil.example\\x07click\\x1b]8;;\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("evil\u202etxt.exe", "evil\\u202etxt.exe"),
        ("a\u200bb\u2060c\ufeffd", "a\\u200bb\\u2060c\\ufeffd"),
        ("hidden\U000e0041tag", "hidden\\U000e0041tag"),
        ("over\rwritten", "over\\x0dwritten"),
        ("two\r\nlines\tand a tab", "two\nlines\tand a tab"),
        ("Grüße, 数据 – “…” ❤️ e\u0301", "Grüße, 数据 – “…” ❤️ e\u0301"),
    ],
)
def test_what_it_looks_like(text, expected):
    assert visible(text) == expected


@given(st.text())
def test_json_keeps_its_values(text):
    written = in_json(json.dumps({text: [text]}, ensure_ascii=False))
    assert json.loads(written) == {text: [text]}
    assert not any(acts(character) for character in written)


@given(st.text(), st.integers(1, 50))
def test_one_line_is_one_line(text, width):
    line = one_line(text, width)
    assert len(line) <= width and not any(acts(character) for character in line) and "\n" not in line


MARKDOWN = [
    "http://evil.example", "www.evil.example", "a@evil.example", "[a](http://evil.example)", "![a](http://evil.example)",
    "<img src=http://evil.example>", "<script>alert(1)</script>", "`<b>`", "``a` <b>", "`", "``", "a|b", "", " ",
    "[a]: http://evil.example", "&lt;b>", "**bold**", "\n# head", "a `code` <i> ``more`` |",
]  # fmt: skip


@pytest.mark.parametrize("text", MARKDOWN)
@pytest.mark.parametrize("where", ["table", "item"])
def test_nothing_in_a_card_is_live(text, where):
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    source = f"| a |\n|---|\n| {as_cell(text)} |\n" if where == "table" else f"- {as_code(text)}\n"
    tokens = [inner for token in parser.parse(source) for inner in (token, *(token.children or ()))]
    kinds = {token.type for token in tokens}
    assert "code_inline" in kinds
    assert not kinds & {"link_open", "image", "html_inline", "html_block", "heading_open", "strong_open"}
    (code,) = [token.content for token in tokens if token.type == "code_inline"]
    assert code.strip() == " ".join(text.split())


def test_an_error_that_quotes_data_acts_on_nothing():
    error = UnreadableFile("/inbox/\x1b[2J\u202e.jsonl", "\x9bboom")
    assert str(error) == "/inbox/\\x1b[2J\\u202e.jsonl: \\x9bboom"


# -- ways out -----------------------------------------------------------------------------------------------------

# The places where something is printed or made Markdown, each of which uses `text`.
PRINTS = {"cli/common.py", "progress.py", "demo/make_model.py", "settings/reference.py"}
MARKDOWN_OF = {
    "metadata.py": "a picture of ours",
    "work.py": "paths, as code",
    "report/report.py": "sentences on targets and strategies, whose names are checked",
    "experiment/experiment.py": "the same",
    "trust/trust.py": "the same",
}


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def test_no_module_prints_past_the_one_that_makes_text_visible():
    for path in sorted((ROOT / "prism_assets").rglob("*.py")):
        name = path.relative_to(ROOT / "prism_assets").as_posix()
        if name.startswith("resources/"):
            continue
        found = set(calls(ast.parse(path.read_text(encoding="utf-8"))))
        if name not in PRINTS:
            assert not found & {"print_", "echo", "secho", "Console"}, name
            # A tree, whose texts are escaped in catalog/tree.py.
            assert "print" not in found or name == "cli/lineage.py", name
        if name not in MARKDOWN_OF:
            assert "md" not in found, name
