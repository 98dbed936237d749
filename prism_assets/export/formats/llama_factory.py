"""For LLaMA-Factory: the rows' text in parts, with and without loss, and a configuration that trains on them.

LLaMA-Factory has templates of its own, by name, and none that is Jinja. So the rows bring their text as the project's
template wrote it, and its template `empty` adds nothing: what is from human has no loss, what is from gpt has.
"""

from pathlib import Path
from typing import Any

from prism_assets.errors import CannotExport
from prism_assets.export.formats.format import (
    JSON_LINES,
    OUTPUT,
    TEMPLATE,
    Format,
    fenced,
    write_json_lines,
    write_yaml,
)
from prism_assets.export.formats.handover import Handover, Row
from prism_assets.export.formats.plan import Plan, whole_alpha, without_nothing

_CONFIG = "train.yaml"
_INFO = "dataset_info.json"
_DATASET = "selected"


def _write(folder: Path, handover: Handover) -> None:
    import json

    options = _options(handover)
    write_json_lines(folder / JSON_LINES, ({"conversations": _turns(row)} for row in handover.rows))
    info = {_DATASET: {"file_name": JSON_LINES, "formatting": "sharegpt", "columns": {"messages": "conversations"}}}
    (folder / _INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    (folder / TEMPLATE).write_text(handover.template, encoding="utf-8", newline="")
    comment = (
        f"Rows that {handover.strategy} selected for {handover.target}: `llamafactory-cli train {_CONFIG}` in this "
        "folder."
    )
    write_yaml(folder / _CONFIG, options, comment)


def _turns(row: Row) -> list[dict[str, str]]:
    """Parts without and with loss in turn, as LLaMA-Factory pairs them; the first may be empty."""
    turns = [{"from": "gpt" if part.supervised else "human", "value": part.text} for part in row.segments]
    return turns if turns[0]["from"] == "human" else [{"from": "human", "value": ""}, *turns]


def _options(handover: Handover) -> dict[str, Any]:
    plan = handover.plan
    length = {"num_train_epochs": plan.epochs} if plan.steps is None else {"max_steps": plan.steps}
    precision = {} if plan.dtype == "float32" else {"bf16": True}
    return {
        "model_name_or_path": plan.model,
        **without_nothing({"model_revision": plan.revision, "trust_remote_code": plan.trust_remote_code}),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        **_adapter(plan),
        "dataset_dir": ".",
        "dataset": _DATASET,
        "template": "empty",  # the rows have their text already
        "mask_history": False,  # every part from gpt has loss
        "train_on_prompt": False,  # no part from human has
        "cutoff_len": handover.longest + 1,
        "packing": False,
        **length,
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": plan.scheduler,
        "warmup_steps": plan.warmup_steps,
        "weight_decay": plan.weight_decay,
        "max_grad_norm": plan.max_grad_norm,
        "optim": "adamw_torch",
        **precision,
        "seed": plan.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": OUTPUT,
    }


def _adapter(plan: Plan) -> dict[str, Any]:
    """The LoRA options. Raises CannotExport for settings that LLaMA-Factory has none for."""
    if plan.starting_adapter is None:
        unsaid = [name for name, value in (("exclude_modules", plan.exclude_modules), ("layers", plan.layers)) if value]
        if unsaid:
            raise CannotExport(f"lora.{unsaid[0]} is set, and LLaMA-Factory has no such option: use --format trl.")
        if isinstance(plan.target_modules, str) and plan.target_modules != "all-linear":
            raise CannotExport(
                "lora.target_modules is a regular expression, and LLaMA-Factory takes names alone: use --format trl or "
                "axolotl."
            )
    names = plan.target_modules
    bits = {"nf4": 4, "int8": 8}.get(plan.quantization)
    four = {"quantization_type": "nf4", "double_quantization": True} if bits == 4 else {}
    quantized = {} if bits is None else {"quantization_method": "bnb", "quantization_bit": bits, **four}
    return {
        **without_nothing({"adapter_name_or_path": plan.starting_adapter}),
        "lora_rank": plan.rank,
        "lora_alpha": whole_alpha(plan, "LLaMA-Factory"),
        "lora_dropout": plan.dropout,
        "lora_target": "all" if isinstance(names, str) else ",".join(names),
        **without_nothing({"use_rslora": plan.rslora}),
        **quantized,
    }


def _use(handover: Handover) -> list[str]:
    return [
        f"`{JSON_LINES}` holds `conversations`: what is from `human` has no loss, what is from `gpt` has. The text is "
        f"what the template of the project (`{TEMPLATE}`) wrote, special tokens, system turns and tools included, and "
        "LLaMA-Factory's own template `empty` adds nothing to it: the loss is where it was when the rows were scored. "
        "Another template would write a second frame around it.",
        "",
        *fenced("sh", f"llamafactory-cli train {_CONFIG}      # in this folder"),
        f"`{_CONFIG}` has the LoRA and training settings of the project, `{_INFO}` says how the file is read.",
    ]


LLAMA_FACTORY = Format((JSON_LINES, TEMPLATE, _INFO, _CONFIG), _write, _use)
