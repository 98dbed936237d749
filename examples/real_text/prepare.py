"""Prepares the example on real text: inbox, targets, tokenizer, a small base model, and the settings.

    python examples/real_text/prepare.py --pool POOL.jsonl --targets FOLDER [--out DIR] [--minutes 6]

POOL.jsonl holds records with `prompt`, `completion` and, for the report only, `source`. FOLDER holds
`<name>/target.jsonl` and `<name>/eval.jsonl` for each target of `prism.yaml`. Written into DIR:

    inbox/part-*.jsonl   the pool in shards; only prompt, completion and source are kept
    targets/<name>/      the targets and held-out records, as they are
    model/               a byte-level BPE tokenizer and a Llama of about 5M parameters, from scratch
    prism.yaml           the settings, with paths relative to DIR

Tokenizer and model see the pool alone, without the records whose prompt is also that of a target or a
held-out record. The data stay under their own licences: commit none of DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prism_assets.corpus.encoder import Encoder
from prism_assets.corpus.records import Message

HERE = Path(__file__).resolve().parent
SETTINGS = HERE / "prism.yaml"
DATA_FOLDER = "work"  # what prism.yaml calls the folder written here
EOS, PAD = "<|endoftext|>", "<|pad|>"
CONTEXT = 512  # tokens that the model can attend to
KEPT_FIELDS = ("prompt", "completion", "source")


class InputError(Exception):
    """A file is missing or is not what it must be; the message says which and why."""


# -- data ------------------------------------------------------------------------------------------


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file. Raises InputError with file and line."""
    if not path.is_file():
        raise InputError(f"there is no {path}")
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: no JSON ({error})") from error
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number}: a record must be a JSON object")
            for field in ("prompt", "completion"):
                if not isinstance(record.get(field), str):
                    raise InputError(f"{path}, line {number}: `{field}` is missing or no text")
            records.append(record)
    if not records:
        raise InputError(f"{path} holds no record")
    return records


def write_inbox(pool: Sequence[dict[str, Any]], inbox: Path, shards: int) -> None:
    """The pool, shuffled with a fixed seed, in `shards` files; fields that give labels away stay behind."""
    shutil.rmtree(inbox, ignore_errors=True)
    inbox.mkdir(parents=True)
    order = list(pool)
    Random(0).shuffle(order)
    for part in range(shards):
        lines = [
            json.dumps({field: record[field] for field in KEPT_FIELDS if field in record}, ensure_ascii=False)
            for record in order[part::shards]
        ]
        (inbox / f"part-{part + 1}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")


def copy_targets(names: Iterable[str], source: Path, out: Path) -> set[str]:
    """Copies target and held-out files; returns the prompts in them."""
    prompts = set()
    for name in names:
        (out / name).mkdir(parents=True, exist_ok=True)
        for file in ("target.jsonl", "eval.jsonl"):
            prompts |= {record["prompt"].strip() for record in read_records(source / name / file)}
            shutil.copyfile(source / name / file, out / name / file)
    return prompts


# -- tokenizer and model ---------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocabulary` tokens: any text can be written with it, and none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int = 256, layers: int = 5) -> LlamaForCausalLM:
    """An untrained Llama: 5.1M parameters with 4,096 tokens, 1M of them the tied embedding. `hidden`: 16 times n."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def packed(
    records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, separator: str, block: int
) -> torch.Tensor:
    """Token ids [blocks, block]: prompt, separator, completion and EOS of each record, one behind the other.

    The pipeline's own encoder writes them, so the model learns the very tokens it will be scored on.
    """
    # The stream is cut into blocks afterwards: no limit here, and no need for the tokenizer's warning.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    encoder = Encoder(tokenizer, max_length=1 << 30, template="plain", separator=separator)
    ids = []
    for record in records:
        exchange = (Message("user", record["prompt"]), Message("assistant", record["completion"]))
        ids.append(torch.from_numpy(encoder.encode(exchange).input_ids).long())
    stream = torch.cat(ids)
    if len(stream) < block:
        raise InputError(f"the pool has {len(stream)} tokens only: too few to train on")
    return stream[: len(stream) // block * block].view(-1, block)


def batches(blocks: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Shuffled passes without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from blocks[torch.randperm(len(blocks), generator=generator)].split(batch_size)


def train(
    model: LlamaForCausalLM,
    blocks: torch.Tensor,
    *,
    minutes: float,
    steps: int | None,
    seed: int,
    batch_size: int = 4,
    peak: float = 2e-3,
) -> None:
    """Next-token cross-entropy by AdamW; a linear warm-up, then a cosine to zero over the budget.

    The budget is `steps` where given (repeatable on one machine), else `minutes` of wall time.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    started, recent = time.monotonic(), []
    for step, ids in enumerate(batches(blocks, batch_size, seed)):
        elapsed = time.monotonic() - started
        done = step / steps if steps else elapsed / (60 * minutes)
        if done >= 1:
            break
        rate = peak * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-49:], loss.item()]
        if (step + 1) % 50 == 0:
            tokens = (step + 1) * blocks.shape[1] * batch_size
            print(
                f"step {step + 1}: loss {sum(recent) / len(recent):.3f} (mean of 50 steps), "
                f"{tokens / blocks.numel():.2f} passes, {elapsed:.0f} s, {100 * done:.0f}% of the budget",
                flush=True,
            )


# -- settings --------------------------------------------------------------------------------------


def write_settings(out: Path) -> Path:
    """The example's prism.yaml, comments included, with paths relative to `out`."""
    path = out / "prism.yaml"
    text = SETTINGS.read_text(encoding="utf-8")
    body = text[text.index("\nmodel:") :].replace(f"{DATA_FOLDER}/", "")
    path.write_text(f"# Written by prepare.py; paths are relative to this file.\n{body}", encoding="utf-8")
    return path


def prepare(arguments: argparse.Namespace) -> Path:
    """Does everything; returns the path of the settings written."""
    settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    out: Path = arguments.out.resolve()
    pool = read_records(arguments.pool)
    held_out = copy_targets(settings["targets"], arguments.targets, out / "targets")
    write_inbox(pool, out / "inbox", arguments.shards)
    seen = [record for record in pool if record["prompt"].strip() not in held_out]
    left_out = len(pool) - len(seen)
    print(f"{len(pool)} records in {arguments.shards} shards; kept from tokenizer and model,")
    print(f"because a target or held-out record has the same prompt: {left_out}")

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    texts = (record[field] for record in seen for field in ("prompt", "completion"))
    tokenizer = train_tokenizer(texts, arguments.vocabulary)
    blocks = packed(seen, tokenizer, settings["tokenization"]["separator"], arguments.block)
    model = build_model(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(tokenizer)} tokens in the vocabulary, {parameters / 1e6:.1f}M parameters, "
          f"{blocks.numel() / 1e6:.2f}M training tokens", flush=True)  # fmt: skip
    train(model, blocks, minutes=arguments.minutes, steps=arguments.steps, seed=arguments.seed)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return write_settings(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--pool", type=Path, required=True, help="the candidates, JSON Lines")
    option("--targets", type=Path, required=True, help="folder with NAME/target.jsonl and NAME/eval.jsonl")
    option("--out", type=Path, default=HERE / DATA_FOLDER, help="where to write (default: %(default)s)")
    option("--minutes", type=float, default=6.0, help="wall time of the training (default: %(default)s)")
    option("--steps", type=int, help="train for so many steps instead of --minutes")
    option("--shards", type=int, default=4, help="files in the inbox (default: %(default)s)")
    option("--vocabulary", type=int, default=4096, help="tokens (default: %(default)s)")
    option("--block", type=int, default=256, help="tokens in a training sequence (default: %(default)s)")
    option("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    option("--seed", type=int, default=0)
    try:
        settings = prepare(parser.parse_args())
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Wrote {settings}. Next: prism run --config {settings}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
