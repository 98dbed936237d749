"""For TRL: the tokens that were scored, with labels, and a script that trains on them.

TRL renders conversations by rules of its own: a completion takes the line end behind the end of a turn into the loss,
turns in the middle need a template that marks them, too long a row loses its end. A data set that has `input_ids` and
`labels` it takes as it is, so that it learns exactly what was scored, whatever the template and the rows are.
"""

from pathlib import Path
from typing import Any

from prism_assets.export.formats.format import OUTPUT, PARQUET, TEMPLATE, Format, fenced
from prism_assets.export.formats.handover import Handover
from prism_assets.export.formats.plan import Plan, without_nothing
from prism_assets.resources.model.quantization import ASKED
from prism_assets.text import as_code

_SCRIPT = "train.py"


def _write(folder: Path, handover: Handover) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = [np.where(row.loss_mask, row.input_ids, -100) for row in handover.rows]
    tokens = pa.list_(pa.int64())
    columns = {
        "input_ids": pa.array([row.input_ids for row in handover.rows], tokens),
        "labels": pa.array(labels, tokens),
    }
    pq.write_table(pa.table(columns), folder / PARQUET)
    (folder / TEMPLATE).write_text(handover.template, encoding="utf-8", newline="")
    (folder / _SCRIPT).write_text(_script(handover), encoding="utf-8")


def _script(handover: Handover) -> str:
    plan = handover.plan
    hub = without_nothing({"revision": plan.revision, "trust_remote_code": plan.trust_remote_code})
    loaded = f"MODEL, {_arguments(hub)}" if hub else "MODEL"
    quantized = ASKED.get(plan.quantization)
    names = ["AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if quantized else [])]
    dtype = f"torch.{plan.dtype}" if plan.dtype != "auto" else "torch.bfloat16 if gpu else torch.float32"
    model = [f"model = AutoModelForCausalLM.from_pretrained({loaded}, dtype={dtype})"]
    if quantized:
        model = [
            f"quantized = BitsAndBytesConfig({_arguments(quantized)}, bnb_4bit_compute_dtype={dtype})",
            f"model = AutoModelForCausalLM.from_pretrained({loaded}, dtype={dtype}, quantization_config=quantized)",
        ]
    peft, adapter, given = "LoraConfig", _lora(plan), "peft_config=adapter"
    if plan.starting_adapter:
        peft, given = "PeftModel", ""
        adapter = [f"model = PeftModel.from_pretrained(model, {plan.starting_adapter!r}, is_trainable=True)"]
    lines = [
        f'"""Fine-tune on the rows that {handover.strategy} selected for {handover.target}: `python train.py`."""',
        "",
        "from pathlib import Path",
        "",
        "import torch",
        "from datasets import load_dataset",
        f"from peft import {peft}",
        f"from transformers import {', '.join(names)}",
        "from trl import SFTConfig, SFTTrainer",
        "",
        "FOLDER = Path(__file__).resolve().parent",
        f"MODEL = {plan.model!r}",
        "",
        "gpu = torch.cuda.is_available()",
        f'rows = load_dataset("parquet", data_files=str(FOLDER / "{PARQUET}"), split="train")',
        f"tokenizer = AutoTokenizer.from_pretrained({loaded})",
        "# The rows are tokens already; the template is saved with the adapter, for whoever generates with it.",
        f'tokenizer.chat_template = (FOLDER / "{TEMPLATE}").read_text(encoding="utf-8")',
        *model,
        *adapter,
        "arguments = SFTConfig(",
        *(f"    {name}={value}," for name, value in _training(plan).items()),
        ")",
        "trainer = SFTTrainer(",
        "    model=model,",
        "    args=arguments,",
        "    train_dataset=rows,",
        "    processing_class=tokenizer,",
        *([f"    {given},"] if given else []),
        ")",
        "trainer.train()",
        f'trainer.save_model(str(FOLDER / "{OUTPUT}"))',
    ]
    return "\n".join(lines) + "\n"


def _lora(plan: Plan) -> list[str]:
    more = without_nothing(
        {
            "use_rslora": plan.rslora,
            "lora_dropout": plan.dropout or None,
            "exclude_modules": plan.exclude_modules,
            "layers_to_transform": plan.layers,
        }
    )
    options = {"r": plan.rank, "lora_alpha": plan.alpha, "target_modules": plan.target_modules, **more}
    return [f'adapter = LoraConfig({_arguments(options)}, task_type="CAUSAL_LM")']


def _training(plan: Plan) -> dict[str, str]:
    """The arguments of SFTConfig as code."""
    length = {"num_train_epochs": plan.epochs} if plan.steps is None else {"max_steps": plan.steps}
    options: dict[str, Any] = {
        **length,
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": plan.scheduler,
        "warmup_steps": plan.warmup_steps,
        "weight_decay": plan.weight_decay,
        "max_grad_norm": plan.max_grad_norm,
        "optim": "adamw_torch",
        "seed": plan.seed,
        "max_length": None,  # the rows are cut already
        "packing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    code = {name: repr(value) for name, value in options.items()}
    return {"output_dir": f'str(FOLDER / "{OUTPUT}")', **code, "bf16": "gpu", "use_cpu": "not gpu"}


def _arguments(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _use(handover: Handover) -> list[str]:
    return [
        f"`{PARQUET}` holds the tokens that were scored: `input_ids`, and `labels` with -100 where there is no loss. "
        "TRL takes such rows as they are, so template, loss mask and length are exactly those under which the rows "
        f"were selected. They belong to the tokenizer of {as_code(handover.plan.model)}; for another model hand over "
        "conversations (`--format openai` or `parquet`).",
        "",
        *fenced("sh", "pip install 'trl>=1.16,<2' peft datasets", f"python {_SCRIPT}"),
        f"`{_SCRIPT}` has the LoRA and training settings of the project. `{TEMPLATE}` is the template of the rows, "
        "which is saved with the adapter.",
    ]


TRL = Format((PARQUET, TEMPLATE, _SCRIPT), _write, _use, has_tokens=True)
