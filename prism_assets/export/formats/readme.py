"""README.md beside exported files: what they are of, how they are used, how an adapter is loaded and served."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from prism_assets.export.formats.format import OUTPUT, TEMPLATE, Format, fenced
from prism_assets.export.formats.handover import Handover
from prism_assets.export.formats.names import FormatName
from prism_assets.resources.model.quantization import ASKED
from prism_assets.settings import Budget
from prism_assets.text import as_code

ADAPTER = "adapter"
_SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank


def readme(handover: Handover, name: FormatName, made: Format) -> str:
    """The text of README.md."""
    lines = [
        f"# {handover.what.capitalize()} for {handover.target} by {handover.strategy}, for {name}\n",
        f"{len(handover.rows):,} rows with {handover.completion_tokens:,} tokens that have loss, of "
        f"{handover.tokens:,} in all.",
        "",
        "## Use\n",
        *made.use(handover),
        "",
        *_what_differs(handover, made),
        *_adapter_section(handover, made),
        *_versions(handover),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _what_differs(handover: Handover, made: Format) -> list[str]:
    """What of the rows a tool sees in another way than they were scored in."""
    lines, cut_to = [], f"cut to {handover.max_length:,} tokens (tokenization.max_length)"
    if handover.cut and made.has_tokens:
        lines.append(f"Rows that were {cut_to}: {handover.cut:,}.")
    elif handover.cut:
        lines.append(
            f"Rows that were {cut_to} when they were scored, and are whole here, up to {handover.longest:,} tokens: "
            f"{handover.cut:,}."
        )
    if handover.retokenized and made.trains and not made.has_tokens:
        lines.append(
            f"Rows that get other tokens here than those that were scored: {handover.retokenized:,}. This tokenizer "
            "writes a text that begins in another way than one that goes on, and each part is tokenised by itself. "
            "`--format trl` hands over the tokens themselves."
        )
    return [*lines, ""] if lines else []


def _adapter_section(handover: Handover, made: Format) -> list[str]:
    places = [OUTPUT] if made.trains else []
    lines = ["## The adapter\n"] if places or handover.adapter else []
    if made.trains:
        lines.append(f"Training leaves a LoRA adapter in `{OUTPUT}`. With PEFT and vLLM:\n")
        lines += [*_loading(handover, OUTPUT), *_serving(handover, OUTPUT, TEMPLATE in made.files)]
    if handover.adapter is not None:
        lines.append(
            f"`{ADAPTER}` is the one that this project trained on the same rows, by its own settings of `training` "
            f"(seed {handover.plan.seed}):\n"
        )
        lines += [*_loading(handover, ADAPTER), *_serving(handover, ADAPTER, TEMPLATE in made.files)]
    return lines


def _loading(handover: Handover, place: str) -> list[str]:
    plan = handover.plan
    revision = f", revision={json.dumps(plan.revision)}" if plan.revision else ""
    quantized: Mapping[str, Any] = ASKED.get(plan.quantization, {})
    names = "AutoModelForCausalLM, BitsAndBytesConfig" if quantized else "AutoModelForCausalLM"
    options = ", ".join(f"{key}={value!r}" for key, value in quantized.items())
    how = f", quantization_config=BitsAndBytesConfig({options})" if quantized else ""
    return fenced(
        "python",
        "from peft import PeftModel",
        f"from transformers import {names}",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(plan.model)}{revision}{how})",
        f'model = PeftModel.from_pretrained(base, "{place}")',
    )


def _serving(handover: Handover, place: str, has_template: bool) -> list[str]:
    plan = handover.plan
    rank = next((one for one in _SERVED_RANKS if one >= plan.rank), plan.rank)
    revision = f" --revision {plan.revision}" if plan.revision and plan.revision != "main" else ""
    template = f" --chat-template {TEMPLATE}" if has_template else ""
    name = f"{handover.target}-{handover.strategy}"
    return fenced(
        "sh",
        f"vllm serve {_shell(plan.model)}{revision} --enable-lora --max-lora-rank {rank}{template} \\",
        f"    --lora-modules {_shell(f'{name}={place}')}",
    )


def _shell(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _versions(handover: Handover) -> list[str]:
    selection = handover.selection
    cited = [("selection", selection), *([("adapter", handover.adapter)] if handover.adapter else [])]
    rows = [
        f"| {what} | `{one.fingerprint}` | `{one.content_hash}` | `{one.header['run_id'] or '–'}` |"
        for what, one in cited
    ]
    return [
        "## Versions\n",
        f"prism-assets {version('prism-assets')}, budget {Budget(**selection.header['settings']['budget'])}, model "
        f"{as_code(handover.plan.model)} with the fingerprint `{handover.model_fingerprint}`. "
        "`prism lineage FINGERPRINT` shows what each was made from.\n",
        "| what | fingerprint | content hash | Dagster run |",
        "|---|---|---|---|",
        *rows,
    ]
