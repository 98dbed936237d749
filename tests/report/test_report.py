import json
import re
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from report_samples import HOSTILE, one_target, sample, with_rows

from prism_assets.evaluation.metrics import mean_over_seeds
from prism_assets.report.comparison import comparison_table
from prism_assets.report.headline import headline
from prism_assets.report.inlined import data_block, scripts
from prism_assets.report.page import build_report
from prism_assets.report.verdict import verdict_sentences


class Page(HTMLParser):
    """Tags with their attributes, text, and the cells of the comparison tables, row by row."""

    VOID = ("meta", "img", "br", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[tuple[dict, str]] = []  # and styles: attributes and text
        self.comparisons: list[list[list[tuple[str, dict]]]] = []
        self.in_comparison = False
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table" and attributes.get("class") == "comparison":
            self.in_comparison = True
            self.comparisons.append([])
        if self.in_comparison and tag == "tr":
            self.comparisons[-1].append([])
        if self.in_comparison and tag in ("td", "th"):
            self.comparisons[-1][-1].append(("", attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"
        if tag == "table":
            self.in_comparison = False

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts.append((self.tags[-1][1], data))
            return
        self.text += data
        if self.in_comparison and self.open[-1] in ("td", "th"):
            text, attributes = self.comparisons[-1][-1][-1]
            self.comparisons[-1][-1][-1] = (text + data, attributes)


@pytest.fixture(scope="module")
def html() -> str:
    return build_report(with_rows(sample()))


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_nothing_in_the_data_becomes_markup(html, page):
    names = {tag for tag, _ in page.tags}
    assert "iframe" not in names and "link" not in names
    assert all(attributes["src"].startswith("data:image/png;base64,") for tag, attributes in page.tags if tag == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "{{ 7 * 7 }}" in page.text and "<script>alert(1)</script>" in page.text
    outside = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", html, flags=re.DOTALL)
    assert "http" not in outside.replace("http-equiv", "")  # nothing is fetched from anywhere


def test_the_policy_lets_the_scripts_of_the_package_run_and_no_others(html, page):
    (policy,) = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv")]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'none'"
    run = [text for attributes, text in page.scripts if attributes == {} and text in scripts()]
    assert [f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in run] == rules[
        "script-src"
    ].split()
    assert "unsafe-eval" not in policy and "unsafe-inline" not in rules["script-src"]
    assert len([tag for tag, attributes in page.tags if tag == "script" and not attributes]) == len(run) == 4
    assert not re.search(r"\beval\(|new Function\b", "".join(run))


def test_the_rows_are_data_that_cannot_end_their_block(page):
    blocks = [text for attributes, text in page.scripts if attributes.get("type") == "application/json"]
    assert len(blocks) == 2 and not any("<" in block or "&" in block for block in blocks)
    rows = json.loads(blocks[0])["rows"]
    assert len(rows) == 60 and rows[0]["p"] == f"{HOSTILE} prompt 0" and rows[0]["t"] == {"prism": [1, 1.0]}
    assert data_block({"a": float("nan"), "b": "\u202e"}) == '{"a":null,"b":"\\\\u202e"}'


def test_a_list_that_is_cut_off_says_where_the_rest_is(page):
    text = " ".join(page.text.split())
    assert "Of the 5,000 rows that uniform took 30 are listed here." in text
    assert "out/reverse_noise/uniform.jsonl" in text and "out/reverse_noise/prism.jsonl" not in text
    assert "nothing is known of it" in text


def test_the_table_on_the_page_has_the_numbers_of_the_data(page):
    data = sample()
    comparison = page.comparisons
    assert len(comparison) == 2
    _, base, *rows = comparison[0]
    strategies = data["targets"]["reverse_noise"]["strategies"]
    assert [row[0][0] for row in rows] == list(strategies)
    for row, entry in zip(rows, strategies.values(), strict=True):
        for (text, attributes), metric in zip(
            row[1:4], ("target_preference", "mean_log_prob", "exact_match"), strict=True
        ):
            mean, std = text.replace("−", "-").split(" ± ")
            assert float(mean) == pytest.approx(entry[metric]["mean"], abs=5e-4)
            assert float(std) == pytest.approx(entry[metric]["std"], abs=5e-4)
            assert float(attributes["data-value"]) == entry[metric]["mean"]
        assert [cell[0] for cell in row[4:]] == ["1,200", "34,567", "90"]
    assert [cell[0] for cell in base[:4]] == ["base", "0.507", "−0.800", "0.400"]
    best = {row[0][0]: ["best" in cell[1].get("class", "").split() for cell in row[1:4]] for row in rows}
    # For mean_log_prob the sample negates the preferences, so the highest mean is uniform's.
    assert best == {
        "prism": [True, False, True],
        "uniform": [False, True, False],
        "random": [False, False, False],
    }


def test_comparison_table_lists_base_and_strategies_of_every_target():
    data = sample()
    data["targets"]["reverse_noise"]["strategies"]["random"]["exact_match"] = None
    data["targets"]["reverse_noise"]["strategies"]["random"]["target_preference"] = mean_over_seeds([0.25])
    header, *rows = comparison_table(data)
    assert header == [
        "target",
        "strategy",
        "target preference",
        "mean log-probability",
        "exact match",
        "rows",
    ]
    assert len(rows) == 2 * 4 and all(len(row) == len(header) for row in rows)
    assert rows[0] == ["reverse_noise", "base", "0.507", "−0.800", "0.400", "–"]
    assert rows[1][:3] == ["reverse_noise", "prism", "0.631 ± 0.009"]
    assert rows[3] == ["reverse_noise", "random", "0.250", "−0.525 ± 0.005", "–", "1,200"]


def with_benchmarks(data: dict) -> dict:
    """The sample with two benchmark metrics for one of its targets: one that is better high, one better low."""
    accuracy = {
        "prism": mean_over_seeds([0.5, 0.6, 0.7]),
        "uniform": mean_over_seeds([0.65, 0.65, 0.65]),
        "random": None,
    }
    perplexity = {"prism": mean_over_seeds([9.0, 11.0]), "uniform": mean_over_seeds([12.0, 12.5]), "random": None}
    common = {"shots": 0, "version": "1"}
    data["targets"]["reverse_noise"]["benchmarks"] = {
        "lm_eval": "0.4.13",
        "limit": 50,
        "metrics": {
            HOSTILE: {"base": 0.25, "higher_is_better": True, "documents": 1234, "strategies": accuracy, **common},
            "words perplexity": {
                "base": 20,
                "higher_is_better": False,
                "documents": 7,
                "strategies": perplexity,
                **common,
            },
        },
    }
    return data


def test_benchmarks_stand_in_the_table_beside_our_own_metrics():
    plain, table = comparison_table(sample()), comparison_table(with_benchmarks(sample()))
    assert table[0] == [*plain[0][:5], HOSTILE, "words perplexity", "rows"]
    scores = {(row[0], row[1]): row[5:7] for row in table[1:]}
    assert scores["reverse_noise", "base"] == ["0.250", "20.000"]
    assert scores["reverse_noise", "prism"] == ["0.600 ± 0.100", "10.000 ± 1.414"]
    assert scores["reverse_noise", "random"] == ["–", "–"] == scores[HOSTILE, "prism"]
    assert [row[:5] + row[7:] for row in table] == plain


def test_the_page_has_a_table_of_benchmarks_that_marks_the_better_end():
    html = build_report(with_benchmarks(sample()))
    assert build_report(sample()).count('<table class="benchmarks">') == 0
    (table,) = [part.split("</table>")[0] for part in html.split('<table class="benchmarks">')[1:]]
    assert "lm-eval 0.4.13, the first 50 documents of each task" in table
    first, second = table.split("<tbody>")[1].split("</tr>")[:2]
    assert '<td class="number best">0.650 ± 0.000</td>' in first and "1,234" in first and "0.250" in first
    assert '<td class="number best">10.000 ± 1.414</td>' in second
    assert (first + second).count("best") == 2


def test_a_report_survives_a_round_trip_through_json():
    data = one_target()
    assert build_report(json.loads(json.dumps(data))) == build_report(data)


def test_sentences_claim_no_more_than_the_spread_allows():
    target = sample()["targets"]["reverse_noise"]
    sentences = verdict_sentences(target)
    against = {
        name: next(s for s in sentences if s.startswith(f"prism against {name}")) for name in ("uniform", "random")
    }
    # 0.631 - 0.4253 = 0.2057; the larger standard deviation is 0.009, of [0.631, 0.640, 0.622].
    assert "target preference higher by 0.206 (22.9 times the larger standard deviation)" in against["uniform"]
    assert "mean log-probability lower by 0.206" in against["uniform"]
    # 0.43 against 0.4267 with standard deviations 0.010 and 0.021
    assert "exact match higher by 0.003 (within one standard deviation: no clear difference)" in against["random"]
    assert any(
        s.startswith("Target preference: prism has the highest mean") and "above uniform." in s for s in sentences
    )
    assert any("11.2 effective targets of 20 (56%)" in s for s in sentences)
    assert any("held-out" in s and "less than uniform's" in s for s in sentences)
    assert any(s.startswith("With 3 seeds") and "no significance test" in s for s in sentences)
    assert not any("optimiser steps" in s or "influence of zero" in s for s in sentences)


def test_equal_figures_are_called_equal_and_no_winner_is_named():
    figure = {"mean_log_prob": {"mean": -1.5, "std": 0.0, "seeds": 3}}
    names = {"prism": figure, "uniform": figure, "less": figure}
    (sentence, *_) = verdict_sentences(
        {"strategies": {**names, "random": {"mean_log_prob": {**figure["mean_log_prob"], "mean": -2.0}}}}
    )
    assert (
        "prism, uniform and less have the same highest mean, −1.500" in sentence and "has the highest" not in sentence
    )


def test_sentences_say_what_weakens_a_comparison():
    target = sample()["targets"]["reverse_noise"]
    target["strategies"]["random"]["steps"] = 45
    target["strategies"]["prism"]["non_positive_influence"] = 1
    target["strategies"]["prism"]["target_preference"] = mean_over_seeds([0.9])
    sentences = verdict_sentences(target)
    assert any("different numbers of optimiser steps: prism 90, uniform 90, random 45." in s for s in sentences)
    assert any("prism: 1 selected row has an influence of zero or less" in s for s in sentences)
    assert any("spread over seeds unknown" in s for s in sentences)
    assert not any("an earlier selection" in s for s in sentences)
    target["strategies"]["less"] = {**target["strategies"]["prism"], "trained_on_earlier": True}
    said = "The figures of less are of adapters that were trained on an earlier selection"
    assert any(s.startswith(said) for s in verdict_sentences(target))
    assert said in headline("reverse_noise", target).sure
    assert any(s.startswith("With 1 to 3 seeds") for s in sentences)


def test_top_examples_and_weights_are_shown_and_long_texts_clipped():
    data = one_target()
    examples = data["targets"]["reverse_noise"]["strategies"]["prism"]["examples"]
    examples[0]["completion"] = "y" * 4000
    text = Page(build_report(data)).text
    assert f"{HOSTILE} 10" in text and f"{HOSTILE} 11" not in text
    assert "y" * 1500 + "… (2,500 more characters)" in text and "y" * 1501 not in text
    assert "target 19" in text and "target 0" in text
    assert "1.95×" in text  # (19 + 0.5) / 200 against 0.05


def test_target_examples_have_their_groups_and_anchors_where_there_are_some():
    data = one_target()
    target = data["targets"]["reverse_noise"]
    plain = Page(build_report(data)).text
    assert "anchor" not in plain.split("Target examples, by preference weight")[1].split("Target direction")[0]
    for row in target["direction"]["weights"]:
        row |= {"completion": "wanted", "rejected": f"unwanted {HOSTILE}", "group": HOSTILE}
    target |= {"anchors": {"shuffled": 20}, "anchors_left_out": {"its answer is empty": 2}, "use": "remove"}
    text = " ".join(Page(build_report(data)).text.split())
    assert "the other one is preferred to (20 shuffled). Left out, its answer is empty: 2." in text
    assert f"unwanted {HOSTILE}" in text and "what raises its preference is harmful" in text


def test_contents_are_listed_where_there_are_several_targets(page):
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"].removeprefix("#") for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 5 and set(links) <= anchors
    bare = {"format": 1, "targets": {"t": {"strategies": {}}}, "rejects": []}
    assert not any(tag == "nav" for tag, _ in Page(build_report(bare)).tags)


def test_what_became_of_the_records_is_shown_by_file_and_reason(page):
    text = "".join(page.text.split())  # cells have nothing between them
    assert "candidates21,2401,0003320075" in text
    assert f"candidates{HOSTILE}30candidatesmissing3" in text.replace("\u2026", "") or "candidatesmissing3" in text
    assert "pool-1bnotread" in text and "ignoredunknownextension" in text
    assert 'prism sql "SELECT kind, name, line, field, reason FROM rejects"' in page.text
    assert page.text.count("pool-1a") == 50  # of the 60 rejects


def test_trust_is_shown_question_by_question_or_named_as_not_measured():
    data = one_target()
    assert "Not measured: prism trust reverse_noise" in " ".join(Page(build_report(data)).text.split())
    data["targets"]["reverse_noise"]["trust"] = [
        {"check": "a", "question": "Does it hold?", "passed": False, "sentence": f"Not by far. {HOSTILE}"},
        {"check": "b", "question": "And that?", "passed": None, "sentence": "Nobody looked."},
    ]
    text = "".join(Page(build_report(data)).text.split())  # cells have nothing between them
    assert "Doesithold?doesnotholdNotbyfar." in text and "Andthat?notmeasuredNobodylooked." in text
    assert "Notmeasured:" not in text


def test_optional_keys_may_be_absent():
    bare = {"format": 1, "targets": {"t": {"strategies": {"prism": {"target_preference": None}}}}}
    page = Page(build_report(bare))
    assert page.comparisons[0][2][1][0] == "–" and not any(tag == "img" for tag, _ in page.tags)
    assert Page(build_report({"format": 1})).comparisons == []
    data = one_target()
    entry = data["targets"]["reverse_noise"]["strategies"]["uniform"]
    for key in list(entry):
        if key != "target_preference":
            del entry[key]
    build_report(data)


def test_what_is_no_report_is_refused():
    with pytest.raises(ValueError, match="format 2"):
        build_report({"format": 2, "targets": {}})
    with pytest.raises(ValueError, match="format None"):
        comparison_table({})
    with pytest.raises(ValueError, match=r"targets\.t: 'strategies' is missing"):
        build_report({"format": 1, "targets": {"t": {}}})


def test_tables_and_sentences_need_no_heavy_import():
    code = (
        "import sys; import prism_assets.report.comparison, prism_assets.report.headline; "
        "heavy = ('torch', 'matplotlib', 'jinja2', 'dagster', 'numpy'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
