"""`prism export --format`: what was selected, as other trainers read it; the loss is where it was when rows were
scored."""

import json
import os
import runpy
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from conftest import make_rows
from prism_assets.errors import CannotExport
from prism_assets.export.formats.names import FORMAT_NAMES
from prism_assets.export.formats.readme import readme

pytestmark = pytest.mark.usefixtures("blank_plots")

# Marks turns by words, writes tools and their calls, and the thinking of the last turn; nothing follows an answer's end
# but the next turn's name. What is said of `enable_thinking` and of the day is in the text of a row.
TEMPLATE = (
    "{{ bos_token }}{% if enable_thinking %}loud {% endif %}"
    "{% if tools %}tools {{ tools[0].function.name }} {% endif %}"
    "{% for message in messages %}{{ message.role }}:"
    "{% if message.reasoning_content %}so {{ message.reasoning_content }}.{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}call {{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}{% if message.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "turn", "parameters": {"type": "object", "properties": {}}}}
CALL = {"function": {"name": "turn", "arguments": {"word": "abc"}}}


def said(*turns, **beside):
    return {
        "messages": [dict(zip(("role", "content"), turn[:2]), **(turn[2:] or ({},))[0]) for turn in turns],
        **beside,
    }


SYSTEM = said(("system", "be brief"), ("user", "copy: ab="), ("assistant", "ab"), id="system")
MASKED = said(
    *(("user", "copy: cd="), ("assistant", "dc", {"weight": 0}), ("user", "no, cd="), ("assistant", "cd")), id="masked"
)
SEVERAL = said(("user", "copy: ef="), ("assistant", "ef"), ("user", "copy: g="), ("assistant", "g"), id="several")
TOOLS = said(
    ("user", "reverse: cba="),
    ("assistant", "", {"tool_calls": [CALL]}),
    ("tool", "abc"),
    ("assistant", "it is abc"),
    tools=[TOOL],
    id="tools",
)
NAMED = said(
    ("user", "reverse: fed="),
    ("assistant", "", {"tool_calls": [{"id": "one", **CALL}]}),
    ("tool", "def", {"tool_call_id": "one"}),
    ("assistant", "def"),
    tools=[TOOL],
    id="named",
)
REASONED = said(("user", "copy: hi="), ("assistant", "hi", {"reasoning_content": "h then i"}), id="reasoned")
TEXT = {"text": "a text of its own", "id": "text"}
LONG = {"prompt": "copy: " + "long " * 60 + "=", "completion": "long", "id": "long"}
EVERYTHING = [SYSTEM, MASKED, SEVERAL, TOOLS, NAMED, REASONED, TEXT, LONG]


def prism(project, *arguments, status=0):
    from prism_assets.cli import app

    result = CliRunner().invoke(app, [*map(str, arguments), "--config", str(project.config)])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


def selected(project, rows, **sections):
    """A project that selects exactly these rows, and has trained nothing."""
    config = project.folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 512}))
    for shard in project.inbox.iterdir():
        shard.unlink()
    project.add("rows", rows)
    project.configure(strategies=["random"], selection={"budget": len(rows)}, **sections)
    prism(project, "select")
    return project


def handed_over(project, name, folder, *more):
    return prism(project, "export", "plain", "--strategy", "random", "--format", name, "--to", folder, *more)


def refused(project, name, folder):
    said_of_it = prism(project, "export", "plain", "--strategy", "random", "--format", name, "--to", folder, status=2)
    assert not folder.exists()
    return said_of_it


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def masked_labels(row):
    return [token if loss else -100 for token, loss in zip(row["input_ids"], row["loss_mask"], strict=True)]


def by_parts(tokenizer, parts):
    """Tokens and labels of parts with and without loss, each tokenised by itself."""
    ids, labels = [], []
    for text, loss in parts:
        new = tokenizer.encode(text, add_special_tokens=False)
        ids += new
        labels += new if loss else [-100] * len(new)
    return ids, labels


@pytest.fixture(scope="module")
def plain(make_project, tmp_path_factory):
    """Exchanges in the plain format."""
    project = make_project(tmp_path_factory.mktemp("plain") / "project")
    return selected(project, make_rows(12, 1))


@pytest.fixture(scope="module")
def everything(make_project, tmp_path_factory):
    """All that a row may hold, under a chat template of the project's own."""
    project = make_project(tmp_path_factory.mktemp("everything") / "project")
    return selected(project, EVERYTHING, tokenization={"max_length": 200, "template": TEMPLATE})


@pytest.fixture(scope="module")
def exports(plain, everything, tmp_path_factory):
    """The folders of both projects in all formats that take their rows."""
    folder = tmp_path_factory.mktemp("exports")
    for name in FORMAT_NAMES:
        handed_over(plain, name, folder / "plain")
    for name in ("trl", "axolotl", "llama-factory", "parquet"):
        handed_over(everything, name, folder / "everything")
    return folder


@pytest.fixture(params=["plain", "everything"])
def both(request, exports):
    return request.getfixturevalue(request.param), exports / request.param


# -- each format -------------------------------------------------------------------------------------------------


def test_trl_s_trainer_trains_on_the_tokens_and_the_loss_that_were_scored(both, monkeypatch, tmp_path):
    pytest.importorskip("trl"), pytest.importorskip("datasets")
    project, folder = both
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    script = tmp_path / "trl" / "train.py"
    shutil.copytree(folder / "trl", script.parent)
    trainer = runpy.run_path(str(script))["trainer"]
    assert trainer.state.global_step == 2 and (script.parent / "output" / "adapter_model.safetensors").is_file()
    rows = project.selected("random")
    assert len(trainer.train_dataset) == len(rows) > 0
    for one, row in zip(trainer.train_dataset, rows, strict=True):
        assert (list(one["input_ids"]), list(one["labels"])) == (row["input_ids"], masked_labels(row))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(rows))])
    for ids, labels, row in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), rows, strict=True):
        assert ids[: len(row["input_ids"])] == row["input_ids"]
        assert labels == masked_labels(row) + [-100] * (len(labels) - len(row["input_ids"]))
    saved = (script.parent / "output" / "chat_template.jinja").read_text()
    assert saved == (folder / "trl" / "chat_template.jinja").read_text()


def test_the_template_beside_the_rows_writes_what_was_scored(both):
    project, folder = both
    tokenizer = project.model.tokenizer()
    template = (folder / "trl" / "chat_template.jinja").read_text(encoding="utf-8")
    compared = 0
    for row in project.selected("random"):
        turns = json.loads(row["messages"])
        if turns[0]["role"] == "text" or row["record_id"] == "long":
            continue
        tools = json.loads(turns.pop(0)["content"]) if turns[0]["role"] == "tools" else None
        ids = tokenizer.apply_chat_template(turns, tools=tools, chat_template=template, return_dict=False)
        assert ids == row["input_ids"]
        prompt = tokenizer.apply_chat_template(
            turns[:-1], tools=tools, chat_template=template, add_generation_prompt=True, return_dict=False
        )
        if "reasoning_content" not in turns[-1]:
            assert (
                ids[: len(prompt)] == prompt and row["loss_mask"][len(prompt)] and not row["loss_mask"][len(prompt) - 1]
            )
        compared += 1
    assert compared >= 6


def test_axolotl_gets_parts_that_tokenise_to_what_was_scored(both):
    project, folder = both
    tokenizer = project.model.tokenizer()
    config = yaml.safe_load((folder / "axolotl" / "axolotl.yaml").read_text())
    records = lines(folder / "axolotl" / config["datasets"][0]["path"])
    rows = project.selected("random")
    assert len(records) == len(rows)
    for record, row in zip(records, rows, strict=True):
        assert record.keys() == {"segments"}
        ids, labels = by_parts(tokenizer, [(part["text"], part["label"]) for part in record["segments"]])
        assert len(ids) <= config["sequence_len"]
        if row["record_id"] == "long":  # whole, where it was cut
            assert len(ids) > 200 and ids[-5:] == row["input_ids"][-5:]
        else:
            assert (ids, labels[1:]) == (row["input_ids"], masked_labels(row)[1:])
    assert config["datasets"][0]["type"] == "input_output" and config["train_on_inputs"] is False
    assert (config["lora_r"], config["lora_alpha"], config["lora_target_linear"]) == (2, 4, True)
    assert (config["max_steps"], config["micro_batch_size"], config["learning_rate"]) == (2, 4, 1e-3)
    assert config["base_model"] == str(project.folder / "model")
    assert (folder / "axolotl" / config["chat_template_jinja"]).is_file()


def test_axolotl_itself_reads_its_configuration_and_its_rows(both):
    input_output = pytest.importorskip("axolotl.prompt_strategies.input_output", exc_type=ImportError)
    schema = pytest.importorskip("axolotl.utils.schemas.config", exc_type=ImportError)
    project, folder = both
    given = yaml.safe_load((folder / "axolotl" / "axolotl.yaml").read_text())
    config = schema.AxolotlInputConfig(**given)
    for name in given:
        assert name in schema.AxolotlInputConfig.model_fields, name
    strategy = input_output.load(project.model.tokenizer(), config)
    for record, row in zip(lines(folder / "axolotl" / "train.jsonl"), project.selected("random"), strict=True):
        if row["record_id"] != "long":
            made = strategy.tokenize_prompt(record)
            assert made["input_ids"] == row["input_ids"] and made["labels"][1:] == masked_labels(row)[1:]


def test_llama_factory_gets_pairs_that_its_empty_template_leaves_as_they_are(both):
    project, folder = both
    tokenizer = project.model.tokenizer()
    config = yaml.safe_load((folder / "llama-factory" / "train.yaml").read_text())
    info = json.loads((folder / "llama-factory" / "dataset_info.json").read_text())[config["dataset"]]
    assert (config["template"], config["mask_history"], config["train_on_prompt"]) == ("empty", False, False)
    assert (config["lora_rank"], config["lora_target"], config["max_steps"]) == (2, "all", 2)
    records = lines(folder / "llama-factory" / info["file_name"])
    rows = project.selected("random")
    assert len(records) == len(rows)
    for record, row in zip(records, rows, strict=True):
        turns = record[info["columns"]["messages"]]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        ids, labels = by_parts(tokenizer, [(turn["value"], turn["from"] == "gpt") for turn in turns])
        assert len(ids) < config["cutoff_len"]
        if row["record_id"] != "long":
            assert (ids, labels[1:]) == (row["input_ids"], masked_labels(row)[1:])


def test_llama_factory_itself_reads_its_configuration_and_its_rows(both, monkeypatch, tmp_path):
    from transformers import AutoTokenizer

    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    data = pytest.importorskip("llamafactory.data", exc_type=ImportError)
    hparams = pytest.importorskip("llamafactory.hparams", exc_type=ImportError)
    project, folder = both
    monkeypatch.chdir(folder / "llama-factory")
    config = yaml.safe_load((folder / "llama-factory" / "train.yaml").read_text())
    config |= {"output_dir": str(tmp_path / "output"), "bf16": False, "use_cpu": True}
    model, given, training, _, _ = hparams.get_train_args(config)
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "model")  # one of its own: it is changed
    template = data.get_template_and_fix_tokenizer(tokenizer, given)
    found = data.get_dataset(template, model, given, training, stage="sft", tokenizer=tokenizer)["train_dataset"]
    rows = project.selected("random")
    assert len(found) == len(rows)
    for one, row in zip(found, rows, strict=True):
        if row["record_id"] != "long":
            assert one["input_ids"] == row["input_ids"] and one["labels"][1:] == masked_labels(row)[1:]


def test_openai_gets_messages_with_weight_zero_where_there_is_no_loss(make_project, tmp_path):
    project = selected(
        make_project(tmp_path / "project"),
        [SYSTEM, MASKED, TOOLS, NAMED],
        tokenization={"max_length": 200, "template": TEMPLATE},
    )
    handed_over(project, "openai", tmp_path / "out")
    records = {
        row["record_id"]: record
        for row, record in zip(
            project.selected("random"), lines(tmp_path / "out" / "openai" / "train.jsonl"), strict=True
        )
    }
    assert records["system"] == {"messages": SYSTEM["messages"]}
    assert [turn.get("weight") for turn in records["masked"]["messages"]] == [None, 0, None, None]
    call = {"type": "function", "function": {"name": "turn", "arguments": '{"word": "abc"}'}}
    for name, identity in (("tools", "call_1"), ("named", "one")):
        _, asks, answers, _ = records[name]["messages"]
        assert asks["tool_calls"] == [{"id": identity, **call}] and answers["tool_call_id"] == identity
        assert records[name]["tools"] == [TOOL]
    assert not (tmp_path / "out" / "openai" / "chat_template.jinja").exists()


def test_sharegpt_gets_conversations_of_from_and_value(make_project, tmp_path):
    project = selected(
        make_project(tmp_path / "project"),
        [SYSTEM, SEVERAL, TOOLS],
        tokenization={"max_length": 200, "template": TEMPLATE},
    )
    handed_over(project, "sharegpt", tmp_path / "out")
    records = {one["id"]: one for one in lines(tmp_path / "out" / "sharegpt" / "train.jsonl")}
    assert records.keys() == {"system", "several", "tools"}
    turns = {name: [(turn["from"], turn["value"]) for turn in one["conversations"]] for name, one in records.items()}
    assert turns["system"] == [("system", "be brief"), ("human", "copy: ab="), ("gpt", "ab")]
    assert [who for who, _ in turns["several"]] == ["human", "gpt", "human", "gpt"]
    assert turns["tools"][1:3] == [
        ("function_call", '{"name": "turn", "arguments": {"word": "abc"}}'),
        ("observation", "abc"),
    ]
    assert json.loads(records["tools"]["tools"]) == [TOOL]


def test_parquet_holds_all_that_the_rows_do(everything, exports):
    rows = pq.read_table(exports / "everything" / "parquet" / "train.parquet").to_pylist()
    stored = everything.selected("random")
    assert [row["id"] for row in rows] == [row["id"] for row in stored] and len(rows) == len(EVERYTHING)
    found = {row["record_id"]: row for row in rows}
    assert [turn["weight"] for turn in found["masked"]["messages"]] == [0, 0, 0, 1]
    assert found["reasoned"]["messages"][1]["reasoning_content"] == "h then i"
    assert json.loads(found["named"]["messages"][1]["tool_calls"])[0]["id"] == "one"
    assert found["named"]["messages"][2]["tool_call_id"] == "one"
    assert json.loads(found["tools"]["tools"]) == [TOOL] and found["system"]["tools"] is None
    assert [(turn["role"], turn["weight"]) for turn in found["text"]["messages"]] == [("text", 1)]
    assert [turn["content"] for turn in found["long"]["messages"]] == [LONG["prompt"], LONG["completion"]]


def test_datasets_reads_every_file_with_all_its_rows(plain, exports, tmp_path):
    datasets = pytest.importorskip("datasets")
    count = len(plain.selected("random"))
    for name in FORMAT_NAMES:
        (file,) = (exports / "plain" / name).glob("train.[jp][sa]*")
        kind = "parquet" if file.suffix == ".parquet" else "json"
        loaded = datasets.load_dataset(kind, data_files=str(file), split="train", cache_dir=str(tmp_path))
        assert len(loaded) == count == 12, name


# -- what is said beside -----------------------------------------------------------------------------------------


def test_the_readme_says_what_was_exported_and_how_it_is_used(plain, exports):
    artifact = plain.selection("random")
    commands = {
        "trl": "python train.py",
        "axolotl": "axolotl train axolotl.yaml",
        "llama-factory": "llamafactory-cli train train.yaml",
        "openai": "fine_tuning.jobs.create",
        "sharegpt": 'load_dataset("json"',
        "parquet": 'load_dataset("parquet"',
    }
    for name, command in commands.items():
        text = (exports / "plain" / name / "README.md").read_text()
        assert command in text and artifact.fingerprint in text and artifact.content_hash in text
        assert f"12 rows with {artifact.notes['completion_tokens']:,} tokens that have loss" in text
        assert ('PeftModel.from_pretrained(base, "output")' in text) == (name in ("trl", "axolotl", "llama-factory"))
        assert not (exports / "plain" / name / "adapter").exists()
    text = (exports / "plain" / "trl" / "README.md").read_text()
    assert "--enable-lora --max-lora-rank 8 --chat-template chat_template.jinja" in text
    assert "--lora-modules plain-random=output" in text


def test_rows_that_were_cut_are_counted(exports):
    cut = {name: (exports / "everything" / name / "README.md").read_text() for name in ("trl", "axolotl", "parquet")}
    assert "cut to 200 tokens (tokenization.max_length): 1." in cut["trl"]
    assert "are whole here, up to 3" in cut["axolotl"] and "are whole here" in cut["parquet"]


def test_settings_come_to_each_trainer_under_its_own_names(plain, tmp_path):
    from prism_assets.export.formats.hand_over import FORMATS
    from prism_assets.export.formats.handover import handover_of

    found = handover_of(plain.stage, "plain", "random")
    changes = dict(quantization="nf4", rslora=True, dropout=0.1, target_modules=["q_proj", "v_proj"], rank=64)
    changes |= dict(steps=None, epochs=2, model="some/model", revision="abc", dtype="bfloat16", trust_remote_code=True)
    found = replace(found, plan=found.plan._replace(**changes))
    for name in ("trl", "axolotl", "llama-factory"):
        (tmp_path / name).mkdir()
        FORMATS[name].write(tmp_path / name, found)
    script = (tmp_path / "trl" / "train.py").read_text()
    compile(script, "train.py", "exec")
    loaded = "MODEL, revision='abc', trust_remote_code=True"
    assert f"AutoTokenizer.from_pretrained({loaded})" in script and f"({loaded}, dtype=torch.bfloat16, quant" in script
    assert "load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True" in script
    assert "r=64, lora_alpha=4, target_modules=['q_proj', 'v_proj'], use_rslora=True, lora_dropout=0.1" in script
    assert "num_train_epochs=2" in script and "max_steps" not in script
    axolotl = yaml.safe_load((tmp_path / "axolotl" / "axolotl.yaml").read_text())
    expected = dict(adapter="qlora", load_in_4bit=True, lora_target_modules=["q_proj", "v_proj"], peft_use_rslora=True)
    expected |= dict(lora_dropout=0.1, num_epochs=2, revision_of_model="abc", bf16=True, trust_remote_code=True)
    assert {name: axolotl.get(name) for name in expected} == expected
    assert "lora_target_linear" not in axolotl and "max_steps" not in axolotl
    factory = yaml.safe_load((tmp_path / "llama-factory" / "train.yaml").read_text())
    expected = dict(quantization_bit=4, quantization_type="nf4", double_quantization=True, lora_target="q_proj,v_proj")
    expected |= dict(use_rslora=True, num_train_epochs=2, model_revision="abc", bf16=True, trust_remote_code=True)
    assert {name: factory.get(name) for name in expected} == expected
    made = readme(found, "axolotl", FORMATS["axolotl"])
    assert "vllm serve some/model --revision abc --enable-lora --max-lora-rank 64" in made
    assert 'from_pretrained("some/model", revision="abc", quantization_config=BitsAndBytesConfig(' in made
    started = replace(found, plan=found.plan._replace(starting_adapter="/an/adapter", quantization="none"))
    FORMATS["trl"].write(tmp_path / "trl", started)
    script = (tmp_path / "trl" / "train.py").read_text()
    compile(script, "train.py", "exec")
    assert (
        "PeftModel.from_pretrained(model, '/an/adapter', is_trainable=True)" in script and "peft_config" not in script
    )
    with pytest.raises(CannotExport, match=r"lora.alpha is 1.5, and axolotl takes whole numbers: use --format trl"):
        FORMATS["axolotl"].write(tmp_path / "axolotl", replace(found, plan=found.plan._replace(alpha=1.5)))


def test_rows_that_a_tool_tokenises_in_another_way_are_counted(plain):
    from prism_assets.export.formats.hand_over import FORMATS
    from prism_assets.export.formats.handover import handover_of

    found = handover_of(plain.stage, "plain", "random")
    assert found.retokenized == 0
    other = replace(found, rows=[found.rows[0]._replace(retokenized=True), *found.rows[1:]])
    assert "other tokens here than those that were scored: 1." in readme(other, "axolotl", FORMATS["axolotl"])
    for name in ("trl", "openai"):
        assert "other tokens here" not in readme(other, name, FORMATS[name])


def test_an_adapter_of_exactly_these_rows_comes_along(two_versions, tmp_path):
    from peft import PeftConfig

    prism(two_versions, "export", "plain", "--format", "openai", "--to", tmp_path)
    text = (tmp_path / "openai" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "adapter")' in text and "--lora-modules plain-prism=adapter" in text
    assert PeftConfig.from_pretrained(str(tmp_path / "openai" / "adapter")).r == 2
    project = two_versions.copy(tmp_path / "project")
    other = project.lake.require("adapters", "random|plain/seed-0")
    project.lake.point(other, "prism|plain/seed-0")
    prism(project, "export", "plain", "--format", "openai", "--to", tmp_path, "--force")
    assert not (tmp_path / "openai" / "adapter").exists()


def test_of_a_removal_the_kept_rows_are_handed_over(make_project, tmp_path):
    from conftest import write_lines

    project = make_project(
        tmp_path / "project",
        strategies=["random"],
        targets={"bad": {"examples": "bad/target.jsonl", "eval": "bad/eval.jsonl", "use": "remove", "budget": 5}},
    )
    pairs = [{**row, "rejected": "zzz" + row["completion"]} for row in make_rows(6, 300, "reverse")]
    write_lines(project.folder / "bad" / "target.jsonl", pairs[:3])
    write_lines(project.folder / "bad" / "eval.jsonl", pairs[3:])
    prism(project, "select")
    shown = prism(project, *("export", "bad", "--strategy", "random", "--format", "sharegpt", "--to", tmp_path / "out"))
    assert "35 rows (kept)" in shown and "newer" not in shown
    kept = {row["id"] for row in project.selected("random", "bad")}
    assert len(lines(tmp_path / "out" / "sharegpt" / "train.jsonl")) == len(kept) == 35


def test_the_last_whole_selection_is_handed_over_while_newer_data_wait(plain, tmp_path):
    project = plain.copy(tmp_path / "project")
    project.add("more", make_rows(5, 99))
    shown = handed_over(project, "parquet", tmp_path / "out")
    assert (
        "12 rows (selected)" in shown and "something newer waits (1 of 2 files of the inbox are not read yet" in shown
    )
    assert "prism select --target plain" in shown


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("openai", "1 of 8 rows hold a text without a conversation, which openai has no place for (text)"),
        ("sharegpt", "1 of 8 rows hold a text without a conversation, which sharegpt has no place for (text)"),
    ],
)
def test_rows_that_a_format_cannot_hold_are_named_with_the_format_that_can(everything, tmp_path, name, says):
    shown = refused(everything, name, tmp_path / "out")
    assert says in shown and "--format parquet" in shown


@pytest.mark.parametrize(
    ("row", "name", "says"),
    [
        (
            REASONED,
            "openai",
            "reasoning beside the answer, which openai has no place for (reasoned): use --format parquet",
        ),
        (
            MASKED,
            "sharegpt",
            "assistant turns without loss, which sharegpt has no place for (masked): use --format openai",
        ),
        (
            NAMED,
            "sharegpt",
            "ids or names at answers of tools, which sharegpt has no place for (named): use --format openai",
        ),
    ],
)
def test_what_a_format_has_no_words_for_is_never_left_out(row, name, says):
    from types import SimpleNamespace

    from prism_assets.corpus.records import messages_from_json
    from prism_assets.export.formats.hand_over import FORMATS
    from prism_assets.export.formats.handover import Row

    turns = json.dumps(
        ([{"role": "tools", "content": json.dumps(row["tools"])}] if "tools" in row else []) + row["messages"]
    )
    one = Row(1, 0.5, "hash", row["id"], None, messages_from_json(turns), [], [], [], False, 0, False)
    with pytest.raises(CannotExport) as caught:
        FORMATS[name].write(None, SimpleNamespace(rows=[one]))
    assert says in str(caught.value) and str(caught.value).startswith("1 of 1 rows hold")


def test_rows_that_were_scored_under_another_template_are_refused(plain, tmp_path):
    project = plain.copy(tmp_path / "project").configure(tokenization={"separator": ":"})
    shown = refused(project, "trl", tmp_path / "out")
    assert "12 of 12 rows" in shown and "prism select --target plain" in shown


def test_an_earlier_folder_is_replaced_only_when_told_to(plain, tmp_path):
    handed_over(plain, "openai", tmp_path)
    card = tmp_path / "openai" / "README.md"
    card.write_text("mine")
    arguments = ("export", "plain", "--strategy", "random", "--format", "openai", "--to", tmp_path)
    assert "--force" in prism(plain, *arguments, status=2) and card.read_text() == "mine"
    handed_over(plain, "openai", tmp_path, "--force")
    assert card.read_text() != "mine"
    (tmp_path / "openai" / "output").mkdir()  # what a trainer left there
    assert "was not written by an export" in prism(plain, *arguments, "--force", status=2)
    assert sorted(os.listdir(tmp_path)) == ["openai"]
    told = prism(plain, *arguments[:-1], tmp_path / "openai" / "train.jsonl", status=2)
    assert "cannot be made (File exists): name another folder" in told


def test_a_selection_that_is_not_made_yet_says_how_it_is(make_project, tmp_path):
    project = make_project(tmp_path / "project", strategies=["random"])
    assert "prism select --target plain" in refused(project, "trl", tmp_path / "out")


@pytest.mark.parametrize(("name", "lora"), [("llama-factory", {"layers": [0]}), ("axolotl", {"exclude_modules": "x"})])
def test_settings_that_a_tool_has_no_option_for_are_refused(plain, tmp_path, name, lora):
    project = plain.copy(tmp_path / "project").configure(lora=lora)
    assert "has no such option: use --format trl" in refused(project, name, tmp_path / "out")
