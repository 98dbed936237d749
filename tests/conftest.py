"""What several test files share: a tiny character model, small projects, and the whole graph run on them.

Everything is generated. A project is a folder with a model, an inbox, targets and a prism.yaml, and a Dagster
instance that lives in memory; `Project.run` is what `prism run` does.
"""

import json
import os
import random
import shutil
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ALPHABET = string.ascii_lowercase + string.digits + " :=,.?"
# Too short to learn anything, long enough that every stage has something to do.
TINY_SETTINGS: dict[str, Any] = {
    "model": {"name": "./model"},
    "lora": {"rank": 2, "alpha": 4},
    "tokenization": {"max_length": 48, "separator": ""},
    "warmup": {"share": 1, "epochs": 2, "batch_size": 16, "learning_rate": 1e-3},
    "features": {"sketch_dim": 256},
    "targets": {"plain": {"examples": "plain/target.jsonl", "eval": "plain/eval.jsonl"}},
    "selection": {"budget": 8},
    "strategies": ["prism", "uniform", "less", "random"],
    "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
    "evaluation": {"max_new_tokens": 4},
    "seeds": [0, 1],
}

# Long files of few tests. One that begins last runs alone while the other process has nothing left.
FIRST = {
    "test_ui.py",
    "test_on_a_device.py",
    "test_ranking_benchmark.py",
    "test_quality_benchmark.py",
    "test_honesty.py",
    "test_notebook.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files of `FIRST`."""
    items.sort(key=lambda item: item.path.name not in FIRST)


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama over single characters, and its tokenizer, as safetensors and tokenizer.json."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {text: index for index, text in enumerate(["<pad>", "<s>", "</s>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                initializer_range=0.2,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


_ENVIRONMENT = dict(os.environ)


@pytest.fixture(autouse=True)
def the_environment_as_it_was():
    """Commands that are called in this process tell Dagster's processes by variables; no other test may see them."""
    yield
    for name in [name for name in os.environ if name == "DAGSTER_HOME" or name.startswith("PRISM_")]:
        if name in _ENVIRONMENT:
            os.environ[name] = _ENVIRONMENT[name]
        else:
            del os.environ[name]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny causal language model; copy it before changing it."""
    import torch

    torch.set_num_threads(1)  # tiny products only lose time by being split between threads
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def blank_plots():
    """For tests that look at no picture: drawing is half of the time of a run."""
    from prism_assets.plots import canvas

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "png", lambda figure: b"no picture")
        yield


def make_rows(count: int, seed: int, skill: str | None = None) -> list[dict[str, Any]]:
    """Records that reverse or copy a word."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 6)))
        kind = skill or rng.choice(["reverse", "copy"])
        completion = word[::-1] if kind == "reverse" else word
        rows.append({"prompt": f"{kind}: {word}=", "completion": completion, "source": kind})
    return rows


def write_lines(path: Path, rows: list[dict[str, Any] | str]) -> Path:
    """JSON Lines; a string is written as the line that it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@dataclass
class Project:
    """A folder with data and a prism.yaml, and a Dagster instance of its own."""

    folder: Path
    content: dict[str, Any]
    instance: Any = field(repr=False)
    results: list[Any] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.folder / "prism.yaml"

    @property
    def inbox(self) -> Path:
        return self.folder / "data" / "candidates"

    @property
    def settings(self) -> Any:
        from prism_assets.settings import load_settings

        return load_settings(self.config)

    @property
    def definitions(self) -> Any:
        from prism_assets.definitions import build_definitions

        return build_definitions(self.settings)

    @property
    def stage(self) -> Any:
        """A Stage outside of any run."""
        from prism_assets.engines import open_stage

        return open_stage(self.settings)

    @property
    def lake(self) -> Any:
        from prism_assets.resources.lake import Lake

        return Lake(root=str(self.settings.storage.root))

    @property
    def model(self) -> Any:
        return self.stage.model

    @property
    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        return json.loads((self.settings.storage.report / "report.json").read_text(encoding="utf-8"))

    def configure(self, **sections: Any) -> "Project":
        """Lay `sections` over prism.yaml: a mapping over the section of its name, anything else in its place."""
        for name, value in sections.items():
            both = isinstance(value, dict) and isinstance(self.content.get(name), dict) and name != "targets"
            self.content[name] = {**self.content[name], **value} if both else value
        self.config.write_text(yaml.safe_dump(self.content, sort_keys=False), encoding="utf-8")
        return self

    def add(self, name: str, rows: list[dict[str, Any] | str]) -> Path:
        """Put a JSON Lines file into the inbox."""
        return write_lines(self.inbox / f"{name}.jsonl", rows)

    def run(self, targets: list[str] | None = None) -> dict[str, int]:
        """`prism run`: how many artefacts each step made."""
        from prism_assets.ops.pipeline import run_pipeline
        from prism_assets.project import Project as Named

        self.results = run_pipeline(Named.of(self.settings), self.definitions, self.instance, targets=targets)
        return {result.step.title: result.computed for result in self.results}

    def run_steps(self, steps: Any, targets: list[str] | None = None) -> list[Any]:
        """Some steps of `prism run`."""
        from prism_assets.ops.pipeline import run_pipeline
        from prism_assets.project import Project as Named

        project = Named.of(self.settings)
        return run_pipeline(project, self.definitions, self.instance, targets=targets, steps=steps)

    def selection(self, strategy: str, target: str = "plain") -> Any:
        """The selection artefact of a strategy."""
        from prism_assets.identity import join_key

        return self.lake.require("selection", join_key(target, strategy))

    def selected(self, strategy: str, target: str = "plain") -> list[dict[str, Any]]:
        """The selected rows in ranking order."""
        return self.lake.read_table(self.selection(strategy, target)).to_pylist()

    def copy(self, folder: Path) -> "Project":
        """The same project in another folder, its lake included, with a fresh Dagster instance."""
        import dagster as dg

        shutil.copytree(self.folder, folder)
        return Project(folder, json.loads(json.dumps(self.content)), dg.DagsterInstance.ephemeral())


def build_project(folder: Path, model: Path, **sections: Any) -> Project:
    """A project with two shards of 20 rows, 6 targets (half reversals, half noise) and 6 held-out records."""
    import dagster as dg

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model, folder / "model")
    project = Project(folder, json.loads(json.dumps(TINY_SETTINGS)), dg.DagsterInstance.ephemeral())
    project.configure(**sections)
    for number in range(2):
        project.add(f"shard{number}", make_rows(20, seed=10 + number))
    noise = [{"prompt": "copy: abc=", "completion": f"{one}zzqj{one}"} for one in "kvw"]
    write_lines(folder / "plain" / "target.jsonl", [*make_rows(3, 100, "reverse"), *noise])
    held_out = [{**row, "answer": row["completion"]} for row in make_rows(6, 200, "reverse")]
    write_lines(folder / "plain" / "eval.jsonl", held_out)
    return project


@pytest.fixture(scope="session")
def make_project(tiny_model: Path):
    """`make_project(folder, **sections of prism.yaml)` builds a `Project` in a new folder."""

    def build(folder: Path, **sections: Any) -> Project:
        return build_project(folder, tiny_model, **sections)

    return build


@pytest.fixture(scope="session")
def two_versions(make_project, tmp_path_factory) -> Project:
    """A project run with exact features and then with a sketch of 64 dimensions. Copy it before changing it.

    Two checkpoints, a plain target and one of pairs; the pool has a duplicate, a contaminated row and a bad line.
    """
    from prism_assets.plots import canvas

    project = make_project(
        tmp_path_factory.mktemp("two_versions") / "project",
        warmup={"checkpoints": 2},
        features={"sketch_dim": "exact"},
        targets={
            "plain": {"examples": "plain/target.jsonl", "eval": "plain/eval.jsonl"},
            "pairs": {"examples": "pairs/target.jsonl", "eval": "pairs/eval.jsonl"},
        },
        seeds=[0],
    )
    first = make_rows(20, 10)
    project.add("shard0", [{**row, "id": f"it's-{number}"} for number, row in enumerate(first)])
    leaked = {"prompt": "reverse: leak=", "completion": "kael"}
    project.add("shard1", [*make_rows(18, 11), first[3], leaked, "{not json"])
    pairs = [{**row, "rejected": row["completion"][::-1] + "x"} for row in make_rows(7, 300, "reverse")]
    write_lines(project.folder / "pairs" / "target.jsonl", pairs[:4])
    write_lines(project.folder / "pairs" / "eval.jsonl", pairs[4:])
    held_out = [{**row, "answer": row["completion"]} for row in [*make_rows(4, 200, "reverse"), leaked]]
    write_lines(project.folder / "plain" / "eval.jsonl", held_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "png", lambda figure: b"no picture")  # drawing is half of the time of a run
        project.run()
        project.configure(features={"sketch_dim": 64}).run()
    return project
