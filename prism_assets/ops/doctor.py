"""`prism doctor`: what an installation has, and which results are stale."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from prism_assets.corpus.intake import CANDIDATES, SHOW_REJECTS, Intake, intake
from prism_assets.errors import ModelError, PrismError, UnreadableFile
from prism_assets.ops.stale import why_outdated
from prism_assets.resources.model.language_model import LanguageModel
from prism_assets.resources.private_folders import open_to_all
from prism_assets.stage import Stage

_MEASURED_SECONDS = 0.25  # of each kind of pass
PACKAGES = ("dagster", "torch", "transformers", "peft", "faiss", "duckdb", "pyarrow")
OPTIONAL = ("bitsandbytes",)


class Finding(NamedTuple):
    """One thing looked at."""

    state: Literal["ok", "note", "problem"]
    what: str
    found: str


def examine(stage: Stage) -> list[Finding]:
    """Versions, device, model, adapter, inbox, target files, stages that do not show today's inputs, and what a run
    will take."""
    return [
        *_versions(),
        *_device(stage.model),
        *_model(stage),
        *_adapter(stage),
        *_optimizer_state(stage),
        *_files(stage),
        *_permissions(stage),
        *_stale(stage),
        *_estimate(stage),
    ]


def _versions() -> list[Finding]:
    found = [Finding("ok", "python", platform.python_version())]
    for package in PACKAGES:
        names = ("faiss-cpu", "faiss-gpu") if package == "faiss" else (package,)
        installed = [(name, number) for name in names if (number := _installed(name))]
        if len(installed) == 1:
            found.append(Finding("ok", package, " ".join(installed[0])))
        elif installed:
            found.append(Finding("problem", package, "faiss-cpu and faiss-gpu are both installed: uninstall one"))
        else:
            found.append(Finding("problem", package, "is not installed: run `make install`"))
    found += [Finding("ok", name, f"{name} {number}") for name in OPTIONAL if (number := _installed(name))]
    return found


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device(model: LanguageModel) -> list[Finding]:
    import torch

    try:
        device = model.torch_device()
    except ModelError as error:
        return [Finding("problem", "device", str(error))]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return [Finding("ok", "device", f"{device.type} ({name}), weights in {model.torch_dtype()}")]


def _model(stage: Stage) -> list[Finding]:
    from prism_assets.corpus.encoding import encoder_of, require_context

    try:
        identity = stage.model_identity
    except ModelError as error:
        return [Finding("problem", "model", str(error))]
    size = identity.parameters_on_disk / 2**20
    name = f"{identity.fingerprint[:12]}{f', linear layers in {identity.quantized}' if identity.quantized else ''}"
    found = [
        Finding(
            "ok",
            "model",
            f"{stage.settings.model.name}: {identity.architecture}, {size:,.1f} MiB, {name}",
        )
    ]
    try:
        require_context(stage)
        encoder = encoder_of(stage)
    except ModelError as error:
        found.append(Finding("problem", "max_length", str(error)))
        return found
    unknown = [role for role in ("system", "tool") if role not in encoder.roles]
    words = f"writes {', '.join(encoder.roles)}"
    if unknown:
        merged = "the text of a system turn leads the first user turn" if "system" in unknown else ""
        refused = "records with tools are rejected" if "tool" in unknown else ""
        words += f"; not {', '.join(unknown)}: {'; '.join(filter(None, (merged, refused)))}"
    return [*found, Finding("ok", "template", words)]


def _adapter(stage: Stage) -> list[Finding]:
    """Whether gradients and training work with the model and its adapter."""
    from prism_assets.reference.rehearsal import rehearse

    try:
        _ = stage.model_identity
    except ModelError:
        return []  # said above
    try:
        found = rehearse(stage)
    except PrismError as error:
        return [Finding("problem", "adapter", str(error))]
    left_out = f"; left as they are: {found.left_out}" if found.left_out else ""
    words = f"{found.layers} layers, {found.parameters:,} parameters; a gradient and a step of training were tried"
    return [Finding("ok", "adapter", words + left_out)]


def _optimizer_state(stage: Stage) -> list[Finding]:
    """Whether Adam's moments can be taken from the state that the settings name."""
    path = stage.settings.warmup.optimizer_state
    if path is None:
        return []
    from prism_assets.sft.optimizer_state import read_optimizer_state

    try:
        with stage.adapted() as peft_model:
            found = read_optimizer_state(path, peft_model)
    except PrismError as error:
        return [Finding("problem", "optimizer_state", str(error))]
    words = (
        f"moments of {len(found.exp_avg)} parameters after {found.step:,} steps, betas {found.betas}, eps {found.eps:g}"
    )
    return [Finding("ok", "optimizer_state", f"{path}: {words}; matched by {found.form}")]


def _files(stage: Stage) -> list[Finding]:
    from prism_assets.corpus.candidates import scan_inbox

    settings = stage.settings
    findings = []
    inbox = settings.candidates.inbox
    if inbox.is_dir():
        found = scan_inbox(stage, at_rest_seconds=0)
        size = sum(file.size for file in found.files) / 2**20
        state = "ok" if found.files else "problem"
        findings.append(Finding(state, "inbox", f"{inbox}: {len(found.files)} files, {size:,.1f} MiB"))
        findings += [Finding("note", "ignored", f"{one.path}: {one.reason}") for one in found.ignored]
    else:
        findings.append(Finding("problem", "inbox", f"there is no folder {inbox}"))
    for name, target in settings.targets.items():
        for role, path in (("examples", target.examples), ("eval", target.eval)):
            if not path.is_file():
                findings.append(Finding("problem", f"targets.{name}.{role}", f"there is no file {path}"))
    return findings


def intake_of_today(stage: Stage) -> Intake | None:
    """What became of the records given, as far as the lake knows; None where there is no model or no inbox."""
    from prism_assets.corpus.candidates import scan_inbox

    try:
        _ = stage.corpus_version
    except ModelError:
        return None
    if not stage.settings.candidates.inbox.is_dir():
        return None
    found = scan_inbox(stage, at_rest_seconds=0)
    return intake(stage, found.ignored, [file.key for file in found.files])


def integrity(stage: Stage) -> list[Finding]:
    """What is damaged, each file set aside so that the next run makes it again; read whole, so it takes its time."""
    from prism_assets.ops.integrity import damaged

    found = [Finding("problem", "damaged", one) for one in damaged(stage)]
    return found or [Finding("ok", "integrity", "every artefact has the content that was published")]


def _permissions(stage: Stage) -> list[Finding]:
    """Whether others on this machine can read what people brought."""
    given = os.environ.get("DAGSTER_HOME")
    folders = {"lake": stage.lake.folder} | ({"DAGSTER_HOME": Path(given)} if given else {})
    # What lies in a closed folder is closed.
    closed = [folder.resolve() for folder in folders.values() if folder.is_dir() and not open_to_all(folder)]
    return [
        Finding("note", what, f"every user of this machine can look into {folder}: chmod o= {folder}")
        for what, folder in folders.items()
        if open_to_all(folder) and not any(folder.resolve().is_relative_to(one) for one in closed)
    ]


def _estimate(stage: Stage) -> list[Finding]:
    """Records of targets that are lost, and what a run will take."""
    from prism_assets.ops.estimate import estimate, size_text
    from prism_assets.ops.figures import target_figures

    try:
        targets = target_figures(stage, list(stage.settings.targets))
    except PrismError:
        return []  # there is no model, or no tokenizer: said above
    findings = []
    for file in (file for both in targets.values() for file in both if file.path.is_file()):
        what = f"targets.{file.name}.{'examples' if file.kind == 'target' else 'eval'}"
        if file.problem:
            findings.append(Finding("problem", what, file.problem))
        elif file.fit is not None:
            lost = file.fit.lost(stage.settings.tokenization.max_length, stage.model_identity.context_length)
            findings.append(Finding("note" if lost else "ok", what, lost or f"{file.fit.used} records"))
    try:
        found = estimate(stage, targets=targets, seconds=_MEASURED_SECONDS)
    except (PrismError, MemoryError) as error:
        return [*findings, Finding("note", "estimate", f"there is none: {error}")]
    findings.append(Finding("ok", "pool", found.pool_text()))
    if found.measured is None:
        return [*findings, Finding("ok", "run", "everything is up to date")]
    memory, disk = found.measured.memory, found.disk
    state = "problem" if memory.smallest > memory.allowed else "ok"
    sizes = f"{size_text(memory.expected)} at the peak of {size_text(memory.allowed)} that may be held"
    findings.append(Finding("ok", "run", f"{found.time_text()}; `prism estimate` says more"))
    findings.append(Finding(state, "memory", sizes))
    state = "problem" if disk.total > disk.free else "ok"
    findings.append(Finding(state, "disk", f"{size_text(disk.total)} to be written, {size_text(disk.free)} are free"))
    return findings


def _stale(stage: Stage) -> list[Finding]:
    """What of today's inputs and settings the lake does not show yet."""
    from prism_assets.corpus.candidates import inbox_files
    from prism_assets.selection.strategies import STRATEGIES

    settings = stage.settings
    try:
        _ = stage.corpus_version, stage.dtype, stage.optimizer_state
    except (ModelError, UnreadableFile):
        return []  # reported by `_model` and `_optimizer_state`
    if not settings.candidates.inbox.is_dir():
        return []
    keys = sorted(inbox_files(stage, at_rest_seconds=0))
    unread = [key for key in keys if stage.shown_or_none("candidates", key) is None]
    findings = [_share("candidates", len(unread), len(keys), "files are not ingested"), *_rejected(stage, keys)]
    if stage.shown_or_none("warmup_checkpoints") is None:
        return [*findings, Finding("note", "stale", "no warm-up for these settings yet: `prism run` makes it")]
    version = stage.feature_version
    bare = [key for key in keys if stage.shown_or_none("candidate_features", key) is None]
    findings.append(_share("candidate_features", len(bare), len(keys), f"shards have no features of version {version}"))
    index = stage.shown_or_none("candidate_index")
    indexed = set(stage.lake.read_table(index, ["shard"])["shard"].to_pylist()) if index else set()
    findings.append(_share("candidate_index", len(set(keys) ^ indexed), len(keys), "shards differ from the index"))
    old = {}
    for target in settings.targets:
        for strategy in settings.strategies:
            why = why_outdated(stage, target, STRATEGIES[strategy])
            if why:
                old[f"{target}/{strategy}"] = why
    total = len(settings.targets) * len(settings.strategies)
    named = ", ".join(f"{name}: {why}" for name, why in list(old.items())[:5])
    findings.append(_share("selection", len(old), total, f"are not what today's inputs and settings give ({named})"))
    return findings


def _rejected(stage: Stage, keys: list[str]) -> list[Finding]:
    """Files of the inbox that could not be read, and how many records of the others were rejected or cut."""
    pool = next((part for part in intake(stage, shards=keys).parts if part.name == CANDIDATES), None)
    if pool is None:
        return []
    findings = [Finding("problem", "unreadable", f"{name}: {why}") for name, why in pool.unreadable.items()]
    if pool.rejected:
        findings.append(Finding("note", "rejects", f"{pool.rejected} records were rejected: {SHOW_REJECTS}"))
    if pool.cut:
        longest = stage.settings.tokenization.max_length
        what = "a part of their prompt (texts: their end)"
        words = f"{pool.cut} rows lose {what} to tokenization.max_length ({longest:,})"
        findings.append(Finding("note", "truncated", words))
    return findings


def _share(what: str, stale: int, total: int, words: str) -> Finding:
    if not stale:
        return Finding("ok", what, "up to date")
    return Finding("note", what, f"{stale} of {total} {words}")
