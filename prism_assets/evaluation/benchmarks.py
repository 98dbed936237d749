"""Standard benchmarks: tasks of lm-eval's harness (EleutherAI/lm-evaluation-harness) on a model in memory.

A task is named by the harness's name (`arc_easy`), whose data come from the hub or its cache, or by the path of a task
file (YAML) whose data may be in the same folder. This module alone calls the harness: it reads task files and data,
nothing of the lake.
"""

import copy
import difflib
import glob
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from prism_assets.compat import bars_for_terminals, harness_yaml_loader
from prism_assets.errors import UnusableBenchmark
from prism_assets.resources.lake.hashing import hash_file, hash_folder
from prism_assets.resources.lake.recipe import digest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

TASK_FILES = (".yaml", ".yml")
OWN_FILE = (
    "a task of your own is named by the path of its file, as ./mytask.yaml with `task:`, `dataset_path: json` and "
    "`dataset_kwargs: {data_files: …}`"
)
# The harness's own defaults: few-shot examples are those that its command line draws.
_SEED, _FEWSHOT_SEED = 0, 1234


class Task(NamedTuple):
    """An entry of `evaluation.benchmarks`."""

    name: str  # a task, group or tag of the harness, or what the task file says of itself
    config: dict[str, Any] | None  # content of a task file, its data named by absolute paths; None for a name
    content: str | None  # a hash of the task file, what it includes, the Python beside it and its data


class Score(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    filter: str  # how an answer is cut out of what was generated; "none" where it is not
    value: float
    higher_is_better: bool | None
    documents: int  # that were evaluated
    shots: int
    task_version: str
    asked: bool  # the settings ask for it; False for members of a group that has a score of its own

    @property
    def label(self) -> str:
        """Task, metric and filter, as tables and plots name the score."""
        return f"{self.task} {self.metric}" + ("" if self.filter == "none" else f" ({self.filter})")


def harness_version() -> str:
    """The version of lm-eval."""
    from importlib.metadata import version

    return version("lm-eval")


# -- tasks -------------------------------------------------------------------------------------------------------


def read_tasks(entries: Sequence[str]) -> list[Task]:
    """The tasks that `evaluation.benchmarks` names; no data set is loaded yet.

    Raises UnusableBenchmark for a name that the harness does not know, a task file or data file that is missing or
    broken, and a task that is named twice.
    """
    tasks = [_read_file(Path(entry)) if entry.endswith(TASK_FILES) else _known(entry) for entry in entries]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UnusableBenchmark(
                f"evaluation.benchmarks: two entries are the task {name!r}; results are stored under that name."
            )
    return tasks


@cache
def _manager(defaults: bool) -> "TaskManager":
    """The harness's index. Its own 14,000 names take seconds to read, so they are read where one is asked for."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _known(name: str) -> Task:
    known = _manager(True).all_tasks
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        advice = f"did you mean {' or '.join(near)}? Else " if near else ""
        raise UnusableBenchmark(
            f"evaluation.benchmarks: lm-eval {harness_version()} has no task {name!r}; {advice}{OWN_FILE}."
        )
    return Task(name, None, None)


def _read_file(path: Path) -> Task:
    load_yaml = harness_yaml_loader()
    place = f"evaluation.benchmarks: {path}"
    if not path.is_file():
        raise UnusableBenchmark(f"{place}: there is no such file.")
    try:
        files = _task_files(path)
        config = load_yaml(path)
    except Exception as error:  # YAML, an include, a !function and what its module does
        raise UnusableBenchmark(f"{place} is no task file of lm-eval: {error}") from error
    if not isinstance(config.get("task"), str) or "group" in config:
        raise UnusableBenchmark(f"{place} names no single task: give each task a file of its own, with `task: NAME`.")
    options = dict(config.get("dataset_kwargs") or {})
    if options.get("trust_remote_code"):
        raise UnusableBenchmark(f"{place} asks for trust_remote_code: code that comes with a data set is not run here.")
    contents = [hash_file(file) for file in files]
    for key in ("data_files", "data_dir"):
        if key in options:
            options[key] = _anchored(options[key], path.parent)
            contents += [_hash_of(one, place) for one in _local_paths(options[key])]
    source = path.parent / str(config.get("dataset_path") or "")
    if config.get("dataset_path") and source.is_dir():
        config["dataset_path"] = str(source)
        contents.append(hash_folder(source))
    return Task(config["task"], {**config, "dataset_kwargs": options}, digest(contents))


def _task_files(path: Path) -> list[Path]:
    """The file, the files it includes, theirs, and the Python files beside each, which `!function` may name."""
    load_yaml = harness_yaml_loader()
    found = [path, *sorted(path.parent.glob("*.py"))]
    included = load_yaml(path, resolve_func=False, recursive=False).get("include", [])
    for one in included if isinstance(included, list) else [included]:
        if (path.parent / one).resolve() == path.resolve():
            raise ValueError(f"{path.name} includes itself")
        found += _task_files(path.parent / one)
    return list(dict.fromkeys(found))


def _anchored(value: Any, folder: Path) -> Any:
    """Paths of data files made absolute; addresses (hf://, https://) stay."""
    if isinstance(value, Mapping):
        return {split: _anchored(one, folder) for split, one in value.items()}
    if isinstance(value, list):
        return [_anchored(one, folder) for one in value]
    return value if "://" in str(value) else str(folder / str(value))


def _local_paths(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _local_paths(one)
    elif "://" not in value:
        yield value


def _hash_of(pattern: str, place: str) -> str:
    found = [Path(one) for one in sorted(glob.glob(pattern, recursive=True))]
    if not found:
        raise UnusableBenchmark(f"{place} names the data {pattern}, and there is no such file.")
    return digest([hash_folder(one) if one.is_dir() else hash_file(one) for one in found])


# -- running -----------------------------------------------------------------------------------------------------


def run_tasks(
    model: "PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[Task],
    *,
    batch_size: int,
    limit: int | None = None,
) -> list[Score]:
    """The harness's scores of a causal LM, on the device that it is on; at most `limit` documents of each task.

    As by the harness's command line: no chat template, few-shot examples as the task says. Random states are left as
    they were. Raises UnusableBenchmark for a data set that cannot be loaded, for tasks that run what a model wrote, and
    for a score that is no finite number.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    with _seeded(), bars_for_terminals():
        with _only_errors("lm_eval.api.task"):  # it warns of every default that a task file leaves to it
            loaded, asked = _load(tasks)
        with _only_errors("lm_eval.models.huggingface"):  # it warns of every model that is given in memory
            # A copy: the harness may add a padding token.
            harness = HFLM(
                pretrained=model,  # pyright: ignore[reportCallIssue]
                tokenizer=copy.deepcopy(tokenizer),  # pyright: ignore[reportCallIssue]
                batch_size=batch_size,  # pyright: ignore[reportCallIssue]
                trust_remote_code=False,  # pyright: ignore[reportCallIssue]
            )
        results = evaluate(lm=harness, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False)  # pyright: ignore[reportCallIssue]
    return list(_scores(cast("Mapping[str, Any]", results), asked))


def _load(tasks: Sequence[Task]) -> tuple[dict[str, Any], list[str]]:
    """The harness's tasks with their data, and the names whose scores are asked for."""
    manager = _manager(any(task.config is None for task in tasks))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    asked: list[str] = []
    for task in tasks:
        try:
            found = manager.load([copy.deepcopy(task.config) if task.config else task.name])
        except Exception as error:  # data sets, the hub and a task's own code have theirs
            lines = str(error).strip().splitlines() or [""]
            raise UnusableBenchmark(
                f"evaluation.benchmarks: {task.name} cannot be loaded ({type(error).__name__}: {lines[0][:300]}). "
                f"Where its data cannot be downloaded, leave it out or keep a copy of them here: {OWN_FILE}."
            ) from error
        again = sorted(set(found["tasks"]) & set(loaded["tasks"]))
        if again:
            raise UnusableBenchmark(
                f"evaluation.benchmarks: {task.name} holds {again[0]}, which another entry holds too."
            )
        for name, one in found["tasks"].items():
            if getattr(one, "UNSAFE_CODE", False):
                raise UnusableBenchmark(f"evaluation.benchmarks: {name} runs code that the model writes; leave it out.")
            if one.get_config("num_fewshot") is None:
                one.set_config(key="num_fewshot", value=0)
            one.set_fewshot_seed(seed=_FEWSHOT_SEED)
        for part in loaded:
            loaded[part] |= found.get(part) or {}
        group = (found.get("groups") or {}).get(task.name)
        asked += [task.name] if group is not None and group.has_aggregation else list(found["tasks"])
    return loaded, asked


def _scores(results: Mapping[str, Any], asked: Sequence[str]) -> Iterator[Score]:
    for name, metrics in results["results"].items():
        better = results["higher_is_better"].get(name) or {}
        for key, value in metrics.items():
            metric, comma, answer_filter = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            if not math.isfinite(float(value)):
                raise UnusableBenchmark(
                    f"evaluation.benchmarks: the {metric} of {name} is {value}, which no mean can hold; leave this "
                    "metric out of the task, or the task out of the settings."
                )
            yield Score(
                name,
                metric,
                answer_filter,
                float(value),
                better.get(metric),
                int(metrics["sample_len"]),
                int(results["n-shot"].get(name) or 0),
                str(results["versions"].get(name)),
                name in asked,
            )


@contextmanager
def _seeded() -> Iterator[None]:
    """Fixed random states, given back afterwards: tasks may draw from any of them."""
    import numpy as np
    import torch

    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(_SEED)
        np.random.seed(_FEWSHOT_SEED)
        torch.manual_seed(_FEWSHOT_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
