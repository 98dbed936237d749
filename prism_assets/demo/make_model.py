"""Trains the demo's model from scratch: `python -m prism_assets.demo.make_model OUT`.

A Llama of 0.8M parameters over single characters, trained on a mixture of generated skills in which most are
answered rightly, some often wrongly, and one does not occur. So the model knows most well, some in part, and
one not at all: the state in which the choice of fine-tuning data matters. A few minutes on two cores. The
result is seeded; its last bits depend on the library versions and the number of threads.
"""

from __future__ import annotations

import argparse
import string
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple, cast

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prism_assets.demo.skills import SKILLS, SkillExample, draw

BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n\t"
IGNORED = -100


class Exposure(NamedTuple):
    """How often a skill is drawn in training, and how often its answer is then that of another skill."""

    share: float
    mistakes: float = 0.0


# Skills with right answers become known. The three with mistakes are known in part, or hidden behind wrong
# answers, as skills are that a model has met in careless text. Addition is missing: the model never sees it.
EXPOSURE: dict[str, Exposure] = {
    "copy": Exposure(1.0),
    "duplicate": Exposure(1.0),
    "swapcase": Exposure(1.0),
    "initials": Exposure(1.0),
    "last": Exposure(0.5),
    "vowels": Exposure(1.0),
    "count": Exposure(0.5),
    "rotate": Exposure(1.0),
    "reverse": Exposure(0.6, mistakes=0.5),
    "sort": Exposure(1.5, mistakes=0.5),
    "shift": Exposure(0.4, mistakes=0.6),
}
# Whose answers stand for a mistake: each takes and returns a string of letters.
CONFUSED = ("copy", "rotate", "reverse", "sort", "shift")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (printable ASCII, space, tab, newline), `<s>` in front, anything else `<unk>`."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, its weights drawn from torch's global generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=cast("int", tokenizer.bos_token_id),
            eos_token_id=cast("int", tokenizer.eos_token_id),
            pad_token_id=cast("int", tokenizer.pad_token_id),
        )
    )


def collate(examples: Sequence[SkillExample], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [examples, longest]; the labels cover the completion and the EOS token."""
    ids, labels = [], []
    for example in examples:
        prompt = tokenizer.encode(example.prompt)
        completion = tokenizer.encode(example.completion, add_special_tokens=False) + [tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + completion))
        labels.append(torch.tensor([IGNORED] * len(prompt) + completion))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, cast("int", tokenizer.pad_token_id)), pad(labels, True, IGNORED)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
) -> None:
    """Minimises the cross-entropy of completions drawn from the mixture, by AdamW with a one-cycle rate."""
    rng = Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    names, shares = list(EXPOSURE), [exposure.share for exposure in EXPOSURE.values()]
    model.train()
    started = time.monotonic()
    for step in range(1, steps + 1):
        examples = [training_example(name, rng) for name in rng.choices(names, shares, k=batch_size)]
        ids, labels = collate(examples, tokenizer)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


def training_example(name: str, rng: Random) -> SkillExample:
    """An example of the skill, its answer now and then that of another skill (see `EXPOSURE`)."""
    skill = SKILLS[name]
    argument = skill.draw(rng)
    solver = skill
    if rng.random() < EXPOSURE[name].mistakes:
        solver = SKILLS[rng.choice([other for other in CONFUSED if other != name])]
    return SkillExample(skill.prompt(argument), solver.solve(argument), name)


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[SkillExample]) -> float:
    """The share of examples whose completion greedy generation gives exactly."""
    model.eval()
    texts = [example.prompt for example in examples]
    prompts = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        max_new_tokens=12,
        do_sample=False,
    )
    written = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [text == example.completion for text, example in zip(written, examples, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    """Train the model and write it, then print how well it knows each skill."""
    parser = argparse.ArgumentParser(description="Trains the demo's language model from scratch.")
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, seed=arguments.seed, steps=arguments.steps)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    held_out = Random(arguments.seed + 1)
    for name in SKILLS:
        score = exact_match(model, tokenizer, [draw(name, held_out) for _ in range(200)])
        print(f"{name:10} exact match {score:.2f}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
