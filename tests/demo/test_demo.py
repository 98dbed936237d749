"""The embedded demo: its skills, its checkpoint, its data and its settings."""

import gzip
import json
from collections import Counter
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from prism_assets.demo import data, skills

# (argument, answer), worked out by hand.
ANSWERS = {
    "copy": ("kbde", "kbde"),
    "reverse": ("kbde", "edbk"),
    "sort": ("kbdeb", "bbdek"),
    "addition": ("57+68", "125"),
    "shift": ("azmy", "banz"),
    "duplicate": ("xyx", "xxyyxx"),
    "swapcase": ("aBcD", "AbCd"),
    "initials": ("dog cat eel", "dce"),
    "last": ("kbde", "e"),
    "vowels": ("oxbia", "oia"),
    "count": ("kbdeb", "5"),
    "rotate": ("kbde", "bdek"),
}


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    data.write_demo_data(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def inbox_rows(demo):
    """(shard, prompt, completion, source) of every whole record of the inbox, read without the package."""
    inbox, rows = demo / data.INBOX, []
    for line in (inbox / "strings-1.jsonl").read_text().splitlines()[:-1]:
        record = json.loads(line)
        if record.get("completion"):
            rows.append((1, record["prompt"], record["completion"], record["source"]))
    for line in gzip.decompress((inbox / "strings-2.jsonl.gz").read_bytes()).splitlines():
        record = json.loads(line)
        user, assistant = record["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        rows.append((2, user["content"], assistant["content"], record["source"]))
    for record in pq.read_table(inbox / "strings-3.parquet").to_pylist():
        assert record["input"] is None
        rows.append((3, record["instruction"], record["output"], record["source"]))
    with pa.CompressedInputStream(str(inbox / "strings-4.jsonl.zst"), "zstd") as stream:
        for line in stream.read().splitlines():
            record = json.loads(line)
            rows.append((4, record["prompt"], record["completion"], record["source"]))
    return rows


# --- Skills ----------------------------------------------------------------------------------------------


def test_every_skill_answers_as_worked_out_by_hand():
    assert set(ANSWERS) == set(skills.SKILLS)
    for name, (argument, answer) in ANSWERS.items():
        assert skills.SKILLS[name].solve(argument) == answer


def independent_answer(name, argument):
    codes = np.frombuffer(argument.encode(), dtype=np.uint8).astype(int)
    return {
        "copy": lambda: argument,
        "reverse": lambda: bytes(codes[::-1].tolist()).decode(),
        "sort": lambda: bytes(np.sort(codes).tolist()).decode(),
        "addition": lambda: str(eval(argument)),
        "shift": lambda: bytes(((codes - 97 + 1) % 26 + 97).tolist()).decode(),
        "duplicate": lambda: bytes(np.repeat(codes, 2).tolist()).decode(),
        "swapcase": lambda: bytes((codes ^ 32).tolist()).decode(),
        "initials": lambda: argument[0] + "".join(b for a, b in zip(argument, argument[1:]) if a == " "),
        "last": lambda: chr(codes[-1]),
        "vowels": lambda: bytes(codes[np.isin(codes, list(b"aeiou"))].tolist()).decode(),
        "count": lambda: str(codes.size),
        "rotate": lambda: bytes(np.roll(codes, -1).tolist()).decode(),
    }[name]()


@pytest.mark.parametrize("name", skills.SKILLS)
def test_examples_are_right_short_and_never_empty(name):
    rng = Random(1)
    for _ in range(200):
        example = skills.draw(name, rng)
        start, argument = example.prompt[:-1].split(": ")
        assert (start, example.prompt[-1], example.source) == (name, "=", name)
        assert example.completion == independent_answer(name, argument) != ""
        assert len(example.prompt) + len(example.completion) <= 30


def test_noise_looks_like_every_skill_and_is_right_only_by_chance():
    rng = Random(2)
    drawn = [skills.draw(skills.NOISE, rng) for _ in range(1500)]
    assert {example.source for example in drawn} == {"noise"}
    named = [example for example in drawn if ": " in example.prompt]
    assert 0.6 < len(named) / len(drawn) < 0.73
    assert {example.prompt.split(": ")[0] for example in named} == set(skills.SKILLS)
    right = 0
    for example in named:
        name, argument = example.prompt[:-1].split(": ")
        right += example.completion == independent_answer(name, argument)
    assert right <= 2


def test_an_unknown_source_is_an_error():
    with pytest.raises(KeyError, match="juggling"):
        skills.draw("juggling", Random(0))


# --- The checkpoint --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(data.MODEL)
    return model.eval(), AutoTokenizer.from_pretrained(data.MODEL)


def test_the_checkpoint_is_small_and_holds_safetensors_only():
    names = {path.name for path in data.MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert all(name.endswith((".json", ".safetensors")) for name in names)
    assert sum(path.stat().st_size for path in data.MODEL.iterdir()) <= 4_000_000
    with safe_open(data.MODEL / "model.safetensors", "np") as tensors:
        parameters = sum(np.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    assert 500_000 < parameters < 1_000_000


def test_the_tokenizer_is_one_token_a_character_and_loses_nothing(checkpoint):
    _, tokenizer = checkpoint
    text = "swapcase: aBz Q=\n\t{\"x\": 1 + 2 , 'don't' .}"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == len(text) + 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.chat_template is None
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    assert len(special) == 4 and None not in special
    assert tokenizer.encode("é", add_special_tokens=False) == [tokenizer.unk_token_id]


def test_the_model_knows_some_skills_some_in_part_and_one_not_at_all(checkpoint):
    from prism_assets.demo.make_model import exact_match

    def accuracy(name):
        rng = Random(11)
        return exact_match(*checkpoint, [skills.draw(name, rng) for _ in range(100)])

    assert accuracy("copy") > 0.9
    assert accuracy("duplicate") > 0.9
    for name in data.TARGET_SKILLS:
        assert 0.1 < accuracy(name) < 0.7
    assert accuracy("addition") < 0.1


# --- The data --------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_data(demo, tmp_path):
    data.write_demo_data(tmp_path / "same", seed=3)
    data.write_demo_data(tmp_path / "other", seed=4)
    assert files_of(tmp_path / "same") == files_of(demo)
    other = files_of(tmp_path / "other")
    assert other.keys() == files_of(demo).keys()
    assert all(other[name] != content for name, content in files_of(demo).items())


def test_held_out_targets_and_candidates_share_no_prompt(demo, inbox_rows):
    candidates = {row[1] for row in inbox_rows}
    seen = set(candidates)
    for name in data.TARGET_SKILLS:
        for kind in ("target", "eval"):
            records = lines_of(demo / "targets" / name / f"{kind}.jsonl")
            prompts = {record["prompt"] for record in records}
            assert len(prompts) == len(records)
            assert not prompts & seen
            seen |= prompts


def test_targets_are_half_noise_and_what_is_held_out_is_clean(demo):
    for name in data.TARGET_SKILLS:
        targets = lines_of(demo / "targets" / name / "target.jsonl")
        assert Counter(record["source"] for record in targets) == {name: 16, "noise": 16}
        assert len({record["source"] for record in targets[:16]}) == 2  # shuffled
        held_out = lines_of(demo / "targets" / name / "eval.jsonl")
        assert 100 <= len(held_out) <= 200
        for record in held_out:
            argument = record["prompt"][:-1].split(": ")[1]
            assert record["source"] == name
            assert record["answer"] == record["completion"] == independent_answer(name, argument)


def test_the_inbox_has_the_stated_mixture_duplicates_within_and_across_shards(inbox_rows):
    canonical = {row[1:] for row in inbox_rows}
    composition = Counter(source for _, _, source in canonical)
    assert composition == {**dict.fromkeys(skills.SKILLS, 180), "noise": 840}
    within = Counter(inbox_rows)
    assert {shard for (shard, *_), times in within.items() if times > 1} == {1}
    assert sum(times - 1 for times in within.values()) == 6
    shards = {}
    for shard, *content in inbox_rows:
        shards.setdefault(tuple(content), set()).add(shard)
    assert Counter(map(len, shards.values())) == {1: 2994, 2: 6}
    for shard in (1, 2, 3, 4):  # every shard is a sample of the whole, not a block of one skill
        assert len({source for number, _, _, source in inbox_rows if number == shard}) == 13


def test_the_package_reads_every_format_and_rejects_exactly_the_bad_records(demo, inbox_rows):
    from prism_assets.corpus.files import read_examples

    examples, rejected = [], {}
    for path in sorted((demo / data.INBOX).iterdir()):
        read, rejects = read_examples(path, "candidate")
        examples += read
        rejected[path.name] = [(reject.line, reject.reason) for reject in rejects]
    read = {(example.prompt_text, example.completion_text, example.source) for example in examples}
    assert read == {row[1:] for row in inbox_rows}
    first = rejected.pop("strings-1.jsonl")
    assert set(map(len, rejected.values())) == {0}
    assert [line for line, reason in first] == list(range(751, 760))
    assert sum("duplicate" in reason for _, reason in first) == 6
    for name in data.TARGET_SKILLS:
        for kind in ("target", "eval"):
            read, rejects = read_examples(demo / "targets" / name / f"{kind}.jsonl", kind)
            assert len(read) >= 32 and not rejects


def test_the_settings_are_valid_and_point_at_what_was_written(demo):
    from prism_assets.settings import from_mapping

    settings = from_mapping(data.demo_settings(), demo / "prism.yaml")
    assert (data.MODEL / "config.json").samefile(f"{settings.model.name}/config.json")
    assert {path.name for path in settings.candidates.inbox.iterdir()} == {
        "strings-1.jsonl",
        "strings-2.jsonl.gz",
        "strings-3.parquet",
        "strings-4.jsonl.zst",
    }
    assert set(settings.targets) == set(data.TARGET_SKILLS)
    assert all(target.examples.is_file() and target.eval.is_file() for target in settings.targets.values())
    assert settings.storage.root.is_relative_to(demo)
    assert settings.tokenization.separator == ""
    assert settings.training.steps and len(settings.seeds) >= 3
    assert settings.selection.budget.kind == "share" and 0.05 <= settings.selection.budget.amount <= 0.1
