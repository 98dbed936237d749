"""The fuzz benchmark: its cases cover the formats, and a reader that is at fault is told on."""

import os
import random
import subprocess
import sys

import pytest

from benchmarks import fuzz
from benchmarks.fuzz import Outcome, benchmark, judge, lines_of, measured, read
from benchmarks.fuzz_files import Case, case_of
from benchmarks.fuzz_records import CHANGES, Given, Grammar, Raw, to_json
from prism_assets.corpus.formats import LAYOUTS, PAIR_LAYOUTS, RECORD_FIELDS
from prism_assets.corpus.records import Reject
from prism_assets.corpus.turns import TURN_FIELDS
from prism_assets.errors import UnreadableFile


def kinds(failures):
    return [one.kind for one in failures]


def case(*records, **options):
    """JSON Lines of these records."""
    content = "".join(to_json(one.value) + "\n" for one in records).encode()
    return Case(0, "candidate", "a.jsonl", content, "", dict(enumerate(records, start=1)), **options)


def good(number=1):
    grammar = Grammar(random.Random(number), "candidate", exchanges=True)
    return grammar.draft().good()


@pytest.mark.parametrize("seed", [5143, 36627])
def test_a_footer_that_makes_pyarrow_abort_is_refused(tmp_path, seed):
    found = found_by_us(case_of(seed), tmp_path)
    assert "is not a whole Parquet file" in str(found)


BAD = Given({"prompt": ""}, "empty", "bad")


def found_by_us(one, folder):
    (folder / one.name).write_bytes(one.content)
    return read(folder / one.name, one)


def test_every_layout_field_and_change_is_among_the_records():
    names, changes = set(), set()
    for seed in range(5000):
        for kind in ("candidate", "target"):
            record = Grammar(random.Random(seed), kind, pairs=seed % 4 == 0).record(share_good=0)
            changes.add(record.what)
            names.add(to_json(record.value))
    text = "".join(names)
    fields = {name for layout in (*LAYOUTS, *PAIR_LAYOUTS) for name in layout}
    fields |= {name for names in (*RECORD_FIELDS, *TURN_FIELDS) for name in names.split(", ")}
    assert [name for name in sorted(fields) if f'"{name}"' not in text] == []
    assert {one.__name__ for one in CHANGES} <= changes


def test_a_seed_gives_the_same_case_and_all_formats_come_up():
    cases = [case_of(seed) for seed in range(200)]
    assert [one.content for one in cases] == [case_of(seed).content for seed in range(200)]
    extensions = {one.name.split(".", 1)[1].lower() for one in cases}
    assert {"jsonl", "ndjson", "jsonl.gz", "jsonl.zst", "json", "csv", "tsv", "parquet", "arrow"} <= extensions
    assert {one.refusal for one in cases} == {"must", "may", "never"}


def test_two_hundred_cases_are_read_as_they_must_be(tmp_path):
    encode = fuzz.encoder()
    found = [measured(case_of(seed), tmp_path, encode if seed % 4 == 0 else None) for seed in range(20_000, 20_200)]
    assert [(one.seed, one.failures) for one in found if one.failures] == []


def test_a_reader_that_is_right_has_no_failures(tmp_path):
    one = case(good(1), BAD, good(2))
    assert list(judge(one, found_by_us(one, tmp_path))) == []


@pytest.mark.parametrize("error", [KeyError("role"), RecursionError(), MemoryError(), OSError("disk")])
def test_an_exception_that_is_not_ours_is_a_crash(error):
    assert kinds(judge(case(good()), Outcome([], error))) == ["crash"]


def test_a_refusal_counts_where_the_file_is_sound_and_is_right_where_it_is_not():
    refused = Outcome([], UnreadableFile("a.jsonl", "no"))
    assert kinds(judge(case(good()), refused)) == ["refused_without_need"]
    assert kinds(judge(case(good(), refusal="may"), refused)) == kinds(judge(case(refusal="must"), refused)) == []
    assert kinds(judge(case(refusal="must"), Outcome([]))) == ["silently_accepted"]


def test_a_bad_record_that_is_taken_and_a_good_one_that_is_not_are_told_apart(tmp_path):
    one = case(good(1), good(2))
    both = found_by_us(one, tmp_path).found
    swapped = case(good(1), Given({}, "as if it were bad", "bad"))
    assert kinds(judge(swapped, Outcome(both))) == ["silently_accepted"]
    assert kinds(judge(one, Outcome([both[0], Reject(2, "", "no", "")]))) == ["refused_without_need"]
    assert kinds(judge(one, Outcome(both[:1]))) == ["silently_accepted"]  # one is lost
    assert kinds(judge(one, Outcome([both[1].__class__.create(both[1].messages, line=1), both[1]]))) == [
        "silently_accepted"  # another's text
    ]
    assert kinds(judge(case(good(1), no_examples=True), Outcome(both[:1]))) == ["silently_accepted"]
    assert kinds(judge(case(BAD), Outcome([Reject(1, "\ud800", "no", "")]))) == ["crash"]


def test_a_planted_reader_is_told_on_by_the_whole_measurement(tmp_path):
    """A reader in a process of its own that fails, dies and drops its last record."""
    script = tmp_path / "planted.py"
    script.write_text(
        "import os, sys\n"
        "from benchmarks import fuzz\n"
        "whole = fuzz.read\n"
        "def faulty(path, case):\n"
        "    if case.seed == 2: return fuzz.Outcome([], KeyError('planted'))\n"
        "    if case.seed == 4: os._exit(9)\n"
        "    found = whole(path, case)\n"
        "    return found._replace(found=found.found[:-1]) if case.seed == 6 else found\n"
        "from dataclasses import replace\n"
        "from test_fuzz_benchmark import case, good\n"
        "fuzz.read = faulty\n"
        "fuzz.case_of = lambda seed: replace(case(good(seed), good(seed + 1000)), seed=seed)\n"
        "fuzz.main()\n"
    )
    environment = os.pathsep.join([os.getcwd(), os.path.dirname(__file__)])
    command = ["env", f"PYTHONPATH={environment}", sys.executable, str(script)]
    found = benchmark(range(8), worker=command, batch=5)
    assert [(one["seed"], one["kind"]) for one in found["failures"]] == [
        (2, "crash"),
        (4, "crash"),
        (6, "silently_accepted"),
    ]
    assert (found["cases"], found["crashes"], found["silently_accepted"]) == (8, 2, 1)
    assert "status 9" in found["failures"][1]["why"] and found["peak_mib"] > 0


def test_a_process_that_says_nothing_is_ended():
    command = [sys.executable, "-c", "import time; print('{}', flush=True); time.sleep(600)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert list(lines_of(process, patience=2)) == [{}]
    assert process.wait(10) == -9
    process.stdout.close()


def test_raw_json_is_written_as_it_stands():
    assert to_json({"a": Raw("[1, 1"), "b": float("nan")}) == '{"a":[1, 1,"b":NaN}'
