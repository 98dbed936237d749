"""For axolotl: the rows' text in parts, with and without loss, and a configuration that trains on them.

axolotl's `type: input_output` tokenises each part by itself and adds nothing, as the rows were tokenised when they were
scored. Its `type: chat_template` finds turns in what a template renders by rules of its own, and cannot hold texts.
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
from prism_assets.export.formats.handover import Handover
from prism_assets.export.formats.plan import Plan, whole_alpha, without_nothing

_CONFIG = "axolotl.yaml"


def _write(folder: Path, handover: Handover) -> None:
    options = _options(handover)
    parts = ([{"label": part.supervised, "text": part.text} for part in row.segments] for row in handover.rows)
    write_json_lines(folder / JSON_LINES, ({"segments": one} for one in parts))
    (folder / TEMPLATE).write_text(handover.template, encoding="utf-8", newline="")
    comment = f"Rows that {handover.strategy} selected for {handover.target}: `axolotl train {_CONFIG}` in this folder."
    write_yaml(folder / _CONFIG, options, comment)


def _options(handover: Handover) -> dict[str, Any]:
    plan = handover.plan
    length = {"num_epochs": plan.epochs} if plan.steps is None else {"max_steps": plan.steps}
    pad = {} if handover.pad_token is None else {"special_tokens": {"pad_token": handover.pad_token}}
    return {
        "base_model": plan.model,
        **without_nothing({"revision_of_model": plan.revision, "trust_remote_code": plan.trust_remote_code}),
        "datasets": [{"path": JSON_LINES, "ds_type": "json", "type": "input_output"}],
        "train_on_inputs": False,  # no loss where `label` is false
        "chat_template": "jinja",  # of the tokenizer that is saved; the rows have their text already
        "chat_template_jinja": TEMPLATE,
        "sequence_len": handover.longest,
        "excess_length_strategy": "raise",  # none is longer; else such rows would be left out in silence
        "sample_packing": False,
        "val_set_size": 0,
        **pad,
        **_adapter(plan),
        **length,
        "micro_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "learning_rate": plan.learning_rate,
        "lr_scheduler": plan.scheduler,
        "warmup_steps": plan.warmup_steps,
        "weight_decay": plan.weight_decay,
        "max_grad_norm": plan.max_grad_norm,
        "optimizer": "adamw_torch",
        "bf16": "auto" if plan.dtype == "auto" else plan.dtype == "bfloat16",
        "seed": plan.seed,
        "output_dir": OUTPUT,
        "dataset_prepared_path": f"{OUTPUT}/prepared",
    }


def _adapter(plan: Plan) -> dict[str, Any]:
    """The LoRA options. Raises CannotExport for settings that axolotl has none for."""
    if plan.exclude_modules:
        raise CannotExport("lora.exclude_modules is set, and axolotl has no such option: use --format trl.")
    four, eight = plan.quantization == "nf4", plan.quantization == "int8"
    everything = plan.target_modules == "all-linear"
    return {
        "adapter": "qlora" if four else "lora",
        **without_nothing({"load_in_4bit": four, "load_in_8bit": eight, "lora_model_dir": plan.starting_adapter}),
        "lora_r": plan.rank,
        "lora_alpha": whole_alpha(plan, "axolotl"),
        "lora_dropout": plan.dropout,
        **({"lora_target_linear": True} if everything else {"lora_target_modules": plan.target_modules}),
        **without_nothing(
            {
                "peft_layers_to_transform": plan.layers,
                "peft_use_rslora": plan.rslora,
            }
        ),
    }


def _use(handover: Handover) -> list[str]:
    return [
        f"`{JSON_LINES}` holds `segments`, the text of a row in parts: `label` true where it has loss. The text is "
        f"what the template of the project (`{TEMPLATE}`) wrote, special tokens included; axolotl (`type: "
        "input_output`) tokenises each part by itself and adds nothing, so the loss is where it was when the rows were "
        "scored.",
        "",
        *fenced("sh", f"axolotl train {_CONFIG}      # in this folder"),
        f"`{_CONFIG}` has the LoRA and training settings of the project.",
    ]


AXOLOTL = Format((JSON_LINES, TEMPLATE, _CONFIG), _write, _use)
