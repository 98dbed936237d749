"""Projects that benchmarks run on: a small random language model, an inbox and a target, all generated."""

import json
import random
import string
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ALPHABET = string.ascii_lowercase + string.digits + " :=,.?"


class ModelSize(NamedTuple):
    """Dimensions of the random Llama over single characters."""

    hidden: int = 64
    layers: int = 2


def write_model(folder: Path, size: ModelSize, seed: int = 0) -> None:
    """A random Llama and its tokenizer, as safetensors and tokenizer.json."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {text: index for index, text in enumerate(["<pad>", "<s>", "</s>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=size.hidden,
            intermediate_size=2 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def records(count: int, seed: int) -> list[dict[str, Any]]:
    """Strings to reverse or to copy, of 12 to 20 letters."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(12, 20)))
        skill = rng.choice(["reverse", "copy"])
        rows.append(
            {"prompt": f"{skill}: {word}=", "completion": word[::-1] if skill == "reverse" else word, "source": skill}
        )
    return rows


def write_records(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON Lines, in place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    draft.replace(path)


def build(folder: Path, *, shards: int, rows: int, size: ModelSize, **sections: Any) -> Path:
    """A project with `shards` files of `rows` records; returns its prism.yaml. `sections` are laid over it."""
    write_model(folder / "model", size)
    for number in range(shards):
        write_records(folder / "data" / "candidates" / f"shard{number:04d}.jsonl", records(rows, seed=number))
    write_records(folder / "target.jsonl", records(12, seed=10**6))
    held_out = [{**row, "answer": row["completion"]} for row in records(8, seed=10**6 + 1)]
    write_records(folder / "eval.jsonl", held_out)
    content = {
        "model": {"name": "./model", "device": "cpu"},
        "lora": {"rank": 4, "alpha": 8},
        "tokenization": {"max_length": 128, "separator": ""},
        "warmup": {"share": 0.01, "epochs": 2, "batch_size": 8, "learning_rate": 1e-3},
        "targets": {"strings": {"examples": "target.jsonl", "eval": "eval.jsonl"}},
        "selection": {"budget": 100},
        **sections,
    }
    config = folder / "prism.yaml"
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return config


def run_project(config: Path, steps: Any = None, listener: Any = None) -> list[Any]:
    """`prism run` on a project (or some steps of it), on its own Dagster instance."""
    import os

    from prism_assets import build_definitions, load_settings
    from prism_assets.ops.home import instance_of
    from prism_assets.ops.pipeline import Listener, run_pipeline
    from prism_assets.project import Project

    os.environ["PRISM_CONFIG"] = str(config)
    settings = load_settings(config)
    with instance_of(settings) as instance:
        return run_pipeline(
            Project.of(settings), build_definitions(settings), instance, steps=steps, listener=listener or Listener()
        )
