"""What the feature benchmarks share: rows, a tokenizer trained on them, random models, measured costs."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.real_text import data_folder
from prism_assets.corpus.encoder import Encoder, TokenizedExample
from prism_assets.corpus.records import Message
from prism_assets.corpus.template import Untokenizable

MAX_LENGTH = 512
# Characters of prompts and completions of a real instruction pool, at these percentiles: generated rows have
# the same distribution of lengths.
PERCENTILES = [0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100]
PROMPT_CHARACTERS = [16, 38, 54, 75, 119, 177, 336, 708, 991, 1586, 2400]
COMPLETION_CHARACTERS = [1, 1, 3, 6, 20, 85, 179, 302, 382, 590, 1200]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


class Record(NamedTuple):
    """One row of the pool, as text."""

    prompt: str
    completion: str


class ModelSize(NamedTuple):
    """Dimensions of a random Llama-like model and its LoRA adapter."""

    vocabulary: int
    tied: bool = False
    hidden: int = 256
    intermediate: int = 688
    layers: int = 8
    heads: int = 8
    rank: int = 8
    targets: str | tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class PretrainedModel(NamedTuple):
    """A folder that transformers loads, and the LoRA adapter that the model gets."""

    folder: Path
    rank: int = 8
    targets: str | tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class Cost(NamedTuple):
    """What one run took, in seconds."""

    cpu: float
    wall: float


class ProcessCost(NamedTuple):
    """What a process, and the children that it waited for, took; and what it printed."""

    cost: Cost
    returncode: int
    output: str


def find_pool(given: Path | None) -> Path | None:
    """The pool file: the one given, or in the folder that PRISM_REAL_DATA names; None without."""
    if given is not None:
        if not given.is_file():
            raise SystemExit(f"--pool {given}: no such file")
        return given
    folder = data_folder()
    return folder / "pool.jsonl" if folder else None


def read_pool(path: Path) -> list[Record]:
    """All rows of a pool in JSON Lines with `prompt` and `completion`."""
    with path.open(encoding="utf-8") as lines:
        return [Record(row["prompt"], row["completion"]) for row in map(json.loads, lines)]


def generate_pool(count: int, seed: int = 0) -> list[Record]:
    """Rows of invented words whose lengths are distributed as a real pool's."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(rng.choice(letters, size=rng.integers(1, 9))) for _ in range(5000)]
    frequency = 1 / np.arange(1, len(words) + 1)
    frequency /= frequency.sum()

    def text(characters: list[int]) -> str:
        length = int(np.exp(np.interp(rng.uniform(0, 100), PERCENTILES, np.log(characters))))
        drawn = rng.choice(len(words), size=length // 3 + 1, p=frequency)
        return " ".join(words[index] for index in drawn)[:length].strip() or "a"

    return [Record(text(PROMPT_CHARACTERS), text(COMPLETION_CHARACTERS)) for _ in range(count)]


def train_tokenizer(records: Sequence[Record], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a plain chat template: prompt, newline, completion, EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for record in records for text in record), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def encode(
    tokenizer: PreTrainedTokenizerBase, records: Iterable[Record], count: int
) -> tuple[list[Record], list[TokenizedExample]]:
    """The first `count` rows that fit MAX_LENGTH whole (so that every arm sees the same tokens)."""
    roomy = Encoder(tokenizer, max_length=64 * MAX_LENGTH)
    kept: list[Record] = []
    examples: list[TokenizedExample] = []
    for record in records:
        if len(kept) == count:
            break
        try:
            example = roomy.encode((Message("user", record.prompt), Message("assistant", record.completion)))
        except Untokenizable:
            continue
        if len(example.input_ids) <= MAX_LENGTH:
            kept.append(record)
            examples.append(example)
    if len(kept) < count:
        raise SystemExit(f"only {len(kept)} rows of the pool fit {MAX_LENGTH} tokens, {count} are needed")
    return kept, examples


def make_base(size: ModelSize, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama-like model in float32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=2 * MAX_LENGTH,
            tie_word_embeddings=size.tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def pretrain(model: LlamaForCausalLM, examples: Sequence[TokenizedExample], steps: int, batch_size: int = 8) -> None:
    """A short full training on all tokens, so that gradients are not those of random weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = np.random.default_rng(0).permutation(steps * batch_size) % len(examples)
    model.train()
    for batch in order.reshape(steps, batch_size):
        inputs = padded_inputs([examples[index] for index in batch], all_tokens=True)
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def adapt(base: PreTrainedModel, size: ModelSize | PretrainedModel, seed: int = 0) -> PeftModel:
    """The model with a LoRA adapter whose B is not zero, as after a warm-up."""
    torch.manual_seed(seed + 1)
    targets = size.targets if isinstance(size.targets, str) else list(size.targets)
    model = get_peft_model(
        base,
        LoraConfig(r=size.rank, lora_alpha=2 * size.rank, target_modules=targets, task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model


def padded_inputs(examples: Sequence[TokenizedExample], all_tokens: bool = False) -> dict[str, torch.Tensor]:
    """What a data collator gives a Hugging Face model: right-padded ids, mask, labels."""
    width = max(len(example.input_ids) for example in examples)
    input_ids = torch.zeros(len(examples), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        input_ids[row, :length] = ids
        attention_mask[row, :length] = 1
        supervised = torch.from_numpy(example.loss_mask) | all_tokens
        labels[row, :length] = torch.where(supervised, ids, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def measure(run: Callable[[], Any]) -> Cost:
    """CPU time of this process (all its threads) and wall time of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return Cost(time.process_time() - cpu, time.perf_counter() - wall)


def run_process(command: Sequence[str], **settings: Any) -> ProcessCost:
    """Runs a command and its children to their end."""
    wall = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
    process.stdout.close()
    cost = Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - wall)
    return ProcessCost(cost, process.returncode, output)


def resident_bytes(field: str) -> int:
    """Memory of this process now ("VmRSS") or at most since it was started ("VmHWM").

    Not getrusage: its maximum is inherited from the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
