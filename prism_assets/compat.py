"""Private names of other libraries: the one module that touches them, each with the reason and a guard.

A guard raises `LibraryChanged` where the name is gone or no longer does what is relied on; `tests/test_compat.py` finds
that out when a library is updated. Nothing is imported before it is asked for.

Used where they stand, and held to by tests and an upper bound in pyproject.toml:

- Dagster: the names of `NOT_PROMISED`;
- peft 0.21: `peft.tuners.lora.layer.LoraLayer` and `Linear` with what they hold of an adapter (`gradients/lora.py`):
  the gradient engine does their arithmetic by itself, and `tests/gradients` compares it with autograd;
- bitsandbytes 0.50: what its two layers hold of a quantised weight, `Linear4bit.weight.quant_state` and
  `Linear8bitLt.weight.SCB` or `.state.SCB` (`prism_assets/quantized.py`), and PEFT's layers over them;
  `tests/resources/test_quantization.py` makes the weights from the codes by hand;
- faiss 1.15: the bytes of a written `IndexScalarQuantizer` (`resources/index/segments.py`), read before FAISS maps the
  file, because FAISS does not look where a mapped file ends; `tests/resources/test_index.py` has FAISS write them.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from prism_assets.errors import LibraryChanged

if TYPE_CHECKING:
    import dagster as dg
    import faiss
    from torch.utils.data import Sampler
    from transformers import PreTrainedModel, TrainingArguments

# FAISS writes an index of any width and refuses to read one of more dimensions than this.
MOST_INDEX_DIMENSIONS = 2**20

# Names of Dagster 1.13 that are not private and yet not marked as public either: by the place where they are defined.
# There is no public way to what they do. A test looks for each.
NOT_PROMISED: dict[str, tuple[str, ...]] = {
    "dagster.DagsterInstance": (
        *("report_run_canceled", "report_run_failed", "root_directory", "event_log_storage"),
        *("get_materialized_partitions", "from_ref", "compute_log_manager"),
    ),
    "dagster._core.storage.event_log.base.EventLogStorage": ("free_concurrency_slots_for_run", "get_concurrency_info"),
    "dagster._utils.concurrency.ConcurrencyKeyInfo": ("claimed_slots", "slot_count"),
    "dagster._utils.concurrency.ClaimedSlotInfo": ("run_id", "step_key"),
    "dagster.Definitions": ("resolve_implicit_global_asset_job_def", "get_assets_def", "resources"),
    "dagster.AssetsDefinition": ("map_asset_specs",),
    "dagster.SensorDefinition": ("evaluate_tick",),
    "dagster.RunRequest": ("asset_graph_subset", "for_asset_graph_subset"),
    "dagster.AutomationContext": ("root_context", "get_empty_subset", "partitions_def", "key"),
    "dagster.DagsterEvent": (
        *("is_job_failure", "job_failure_data", "step_failure_data", "step_materialization_data", "step_key"),
        *("event_type_value", "asset_check_evaluation_data"),
    ),
    "dagster.ExecuteInProcessResult": ("success",),
    "dagster.ExecutorDefinition": ("config_schema",),
    "dagster.Executor": ("step_dependency_config",),
    "dagster.AutomationCondition": ("since", "executed_with_root_target"),
    "dagster._core.asset_graph_view.entity_subset.EntitySubset": (
        "expensively_compute_partition_keys",
        "compute_intersection_with_partition_keys",
    ),
}


def use_one_device(arguments: TrainingArguments) -> None:
    """Has the transformers Trainer use one GPU at most, and no DataParallel over all that it sees.

    transformers 5.23: `TrainingArguments.n_gpu` counts the visible GPUs and has no setter; it reads `_n_gpu`. To hide
    GPUs by CUDA_VISIBLE_DEVICES is too late once torch has looked.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if arguments.n_gpu > 1:
        raise LibraryChanged("transformers", "TrainingArguments._n_gpu")


def names_with_decay(model: Any) -> list[str]:
    """Names of the parameters that the transformers Trainer decays; it has the others in a group of their own.

    transformers 5.23: a public method of the Trainer that uses nothing of it, so none is made, which would want
    arguments and a folder.
    """
    from transformers import Trainer

    found = getattr(Trainer, "get_decay_parameter_names", None)
    if found is None or list(inspect.signature(found).parameters) != ["self", "model"]:
        raise LibraryChanged("transformers", "Trainer.get_decay_parameter_names(model)")
    return found(cast("Any", None), model)


class TrainSampler:
    """Beside `transformers.Trainer` as a base: `train_sampler` gives the order in which examples are trained on.

    transformers 5.23: the Trainer asks `_get_train_sampler`, and has no argument for a sampler of one's own. Raises
    LibraryChanged when such a class is made of a Trainer that does not ask: the order would be another one in silence.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(super(), "_get_train_sampler"):
            raise LibraryChanged("transformers", "Trainer._get_train_sampler")

    def train_sampler(self) -> Sampler[int]:
        """The sampler of training examples; a subclass gives it."""
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.train_sampler()


def forget_adapter(base: PreTrainedModel) -> None:
    """What PEFT and transformers note in a model about its adapter goes once the adapter's layers are gone.

    peft 0.18, the oldest allowed: `unload` leaves `peft_config` in the model, and the next adapter is warned of it
    (newer ones take it out, peft's pull request 3067). transformers 5.23: `_hf_peft_config_loaded`, a class attribute
    that an instance may override, says that `peft_config` can be read.
    """
    for name in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(name, None)
    if getattr(base, "_hf_peft_config_loaded", False):
        raise LibraryChanged("transformers", "PreTrainedModel._hf_peft_config_loaded")


def names_of_stacked_experts(model_type: str) -> frozenset[str]:
    """Names that PEFT, given as `target_modules` of such a model, takes for its stacked experts wherever they stand.

    peft 0.21 (`peft.utils.transformers_weight_conversion`): of transformers 5 the experts of a mixture are stacked
    parameters; that an adapter of before still fits, its configuration is rewritten, by the last part of a module's
    name. A dense layer or a shared expert of that name cannot be named. Releases without that module rewrite nothing.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return frozenset()
    try:
        patterns: dict[str, str] = conversion._MODEL_TO_CONVERSION_PATTERN  # pyright: ignore[reportPrivateImportUsage]
        return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(patterns.get(model_type, ""), {}))
    except AttributeError as error:
        raise LibraryChanged("peft", "the tables of peft.utils.transformers_weight_conversion") from error


def refused_by_name(model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT raises for a LoRA layer of this name (its last part) in such a model.

    peft 0.21: Mamba's kernels read the weights of `out_proj` and `conv1d` past their modules, where LoRA has no effect;
    `all-linear` picks them all the same and then fails. The check of a name is private, and so are its lists.
    """
    from peft import LoraConfig, PeftType

    try:
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check
    except ImportError as error:
        raise LibraryChanged("peft", "peft.tuners.tuners_utils._check_lora_target_modules_mamba") from error
    config = LoraConfig()
    config.peft_type = PeftType.LORA
    try:
        check(config, model, name)
    except ValueError:
        return True
    return False


def harness_yaml_loader() -> Callable[..., dict[str, Any]]:
    """The function that reads a task file of lm-eval: `include` followed, `!function` resolved.

    lm-eval 0.4.13: `load_yaml(path, *, resolve_func=True, recursive=True)`; its TaskManager takes names or contents
    and gives no content back, which is needed to know what a result depends on.
    """
    try:
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        if error.name not in (None, "lm_eval.tasks._yaml_loader"):
            raise  # lm-eval itself, or something that it needs, is not installed
        raise LibraryChanged("lm-eval", "lm_eval.tasks._yaml_loader.load_yaml") from error
    return load_yaml


def delete_scanner(scanner: faiss.InvertedListScanner) -> None:  # pyright: ignore[reportAttributeAccessIssue]
    """Frees a scanner that `select_InvertedListScanner` has made.

    faiss 1.15: it is a new object that its Python wrapper does not own, so nobody else frees it; to set `thisown`
    corrupts memory.
    """
    import faiss

    destroy = getattr(faiss.InvertedListScanner, "__swig_destroy__", None)  # pyright: ignore[reportAttributeAccessIssue]
    if destroy is None:
        raise LibraryChanged(_faiss(), "InvertedListScanner.__swig_destroy__")
    if not scanner.thisown:  # a wrapper that owns it frees it by itself
        destroy(scanner)


def _faiss() -> str:
    """Which of the two packages provides the module `faiss`."""
    return packages_distributions().get("faiss", ["faiss-cpu"])[0]


@contextmanager
def bars_for_terminals() -> Iterator[None]:
    """Within the context tqdm's progress bars are shown on a terminal alone, and are gone when they are full.

    tqdm 4.67, for lm-eval 0.4.13: its evaluation has no switch for either, and TQDM_DISABLE is read when tqdm is
    imported.
    """
    from tqdm.std import tqdm

    own, original = vars(tqdm)["__init__"], tqdm.__init__  # a descriptor, which makes a new function each time
    if not {"leave", "disable"} <= set(inspect.signature(original).parameters):
        raise LibraryChanged("tqdm", "the options `leave` and `disable` of tqdm")

    def init(bar: tqdm, *arguments: Any, **options: Any) -> None:
        disable = options.get("disable") or not sys.stderr.isatty()
        original(bar, *arguments, **{**options, "leave": False, "disable": disable})

    tqdm.__init__ = init  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        tqdm.__init__ = own


def any_deps_changed(
    unless: dg.AutomationCondition | None = None, or_requested: bool = True, only: dg.AssetSelection | None = None
) -> dg.AutomationCondition:
    """True where the data version of an input (of `only`) changed, but not `unless` of the input, or, with
    `or_requested`, the input is made in the same run.

    dagster 1.13: `any_deps_updated`, but not for an input that was made again with the same content. The part that
    leaves out inputs whose run makes the asset too, `executed_with_root_target`, is not public.
    """
    import dagster as dg

    conditions = dg.AutomationCondition
    if not hasattr(conditions, "executed_with_root_target"):
        raise LibraryChanged("dagster", "AutomationCondition.executed_with_root_target")
    changed = conditions.data_version_changed() & ~conditions.executed_with_root_target()
    if unless is not None:
        changed = changed & ~unless
    if or_requested:
        changed = changed | conditions.will_be_requested()
    found = conditions.any_deps_match(changed)
    return (found if only is None else found.allow(only)).with_label("any_deps_updated")


def with_run_requests(tick: Any, requests: list[dg.RunRequest]) -> Any:
    """What a sensor found in a tick, with other requests.

    dagster 1.13: `SensorDefinition.evaluate_tick` returns a record, and what copies records is not public.
    """
    try:
        from dagster_shared.record import replace
    except ImportError as error:
        raise LibraryChanged("dagster_shared.record", "replace") from error
    return replace(tick, run_requests=requests)


@contextmanager
def instance_without_captured_output(home: Path) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance of a DAGSTER_HOME, which leaves stdout and stderr of the steps to the terminal.

    dagster 1.13: what captures them is set in dagster.yaml alone, which `dg dev` reads too and needs; `InstanceRef`
    takes another setting over it, and its `from_dir` is private.
    """
    import dagster as dg

    try:
        from dagster._core.instance.ref import InstanceRef
        from dagster._core.storage.noop_compute_log_manager import NoOpComputeLogManager
    except ImportError as error:
        raise LibraryChanged("dagster", "InstanceRef and NoOpComputeLogManager") from error
    if "overrides" not in inspect.signature(InstanceRef.from_dir).parameters:
        raise LibraryChanged("dagster", "InstanceRef.from_dir(overrides=…)")
    no_capture = {"module": NoOpComputeLogManager.__module__, "class": NoOpComputeLogManager.__name__}
    reference = InstanceRef.from_dir(str(home), overrides={"compute_logs": no_capture})
    with dg.DagsterInstance.from_ref(reference) as instance:
        yield instance


def dagster_dev(options: Sequence[str], webserver: Sequence[str]) -> None:
    """`dagster dev`, which starts code server, webserver and daemon, with `webserver` as the command of the second.

    dagster 1.13: that command is fixed, `python -m dagster_webserver`, and so is the application that it serves. Raises
    LibraryChanged where the webserver would be started in another way: it must not run without what stands before it.
    """
    changed = LibraryChanged("dagster", "the way in which `dagster dev` starts its webserver")
    try:
        from dagster._cli import dev

        start = dev.open_ipc_subprocess  # pyright: ignore[reportPrivateImportUsage]
        code = dev.dev_command_impl.__code__
    except (ImportError, AttributeError) as error:
        raise changed from error
    if "dagster_webserver" not in code.co_consts or "open_ipc_subprocess" not in code.co_names:
        raise changed
    usual = [sys.executable, "-m", "dagster_webserver"]

    def start_one(command: list[str], **more: Any) -> Any:
        if command[:3] == usual:
            command = [*webserver, *command[3:]]
        elif command[1:3] != ["-m", "dagster._daemon"]:
            raise changed
        return start(command, **more)

    dev.open_ipc_subprocess = start_one  # pyright: ignore[reportPrivateImportUsage]
    try:
        dev.dev_command.main(list(options), prog_name="prism ui", standalone_mode=False)
    finally:
        dev.open_ipc_subprocess = start  # pyright: ignore[reportPrivateImportUsage]


def serve_dagster_webserver(options: Sequence[str], before: Callable[[Any], Any]) -> None:
    """`dagster-webserver`, with `before(app)` served in place of its application.

    dagster-webserver 1.13 hands its application to `uvicorn.run` and has no way to put anything before it. Raises
    LibraryChanged where it is served in another way.
    """
    import uvicorn

    try:
        from dagster_webserver import cli

        names = cli.host_dagster_ui_with_workspace_process_context.__code__.co_names
    except (ImportError, AttributeError) as error:
        raise LibraryChanged("dagster-webserver", "dagster_webserver.cli") from error
    if getattr(cli, "uvicorn", None) is not uvicorn or not {"uvicorn", "run"} <= set(names):
        raise LibraryChanged("dagster-webserver", "uvicorn.run in dagster_webserver.cli")
    serve = uvicorn.run
    uvicorn.run = lambda app, **more: serve(before(app), **more)  # type: ignore[assignment]
    try:
        cli.dagster_webserver.main(list(options), prog_name="dagster-webserver", standalone_mode=False)
    finally:
        uvicorn.run = serve


@contextmanager
def sleeping_while_waiting(meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within the context a run that waits for a slot sleeps until it may ask again, and calls `meanwhile` before.

    dagster 1.13 takes the smaller of zero and the time that is left, so that it never sleeps: a waiting run would keep
    a core busy, the one that the run which it waits for could use.
    """
    try:
        from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext

        original = InstanceConcurrencyContext.interval_to_next_pending_claim_check
    except (ImportError, AttributeError) as error:
        raise LibraryChanged("dagster", "InstanceConcurrencyContext.interval_to_next_pending_claim_check") from error

    def interval(self: Any) -> float:
        pending = getattr(self, "_pending_timeouts", None)
        if pending is None:
            raise LibraryChanged("dagster", "InstanceConcurrencyContext._pending_timeouts")
        if pending:
            meanwhile()
        left = [ready_at - time.time() for ready_at in pending.values()]
        return max(0.0, min(left, default=0.0))

    InstanceConcurrencyContext.interval_to_next_pending_claim_check = interval  # type: ignore[method-assign]
    try:
        yield
    finally:
        InstanceConcurrencyContext.interval_to_next_pending_claim_check = original  # type: ignore[method-assign]


# Inside of these an interrupt would leave a connection half-used, and its clean-up would print a traceback; or a module
# half-imported, which whoever asks for it next takes for a broken one.
_UNSAFE = (
    *("sqlalchemy", "sqlite3", "alembic", "dagster._core.storage", "dagster._core.instance"),
    *("importlib", "_frozen_importlib"),
)
_ASK_AGAIN_SECONDS = 0.02


class Interrupts:
    """The Ctrl-C of one command: whether one arrived."""

    def __init__(self) -> None:
        self.pending = False
        self._active = True

    def raise_pending(self) -> None:
        """Raise KeyboardInterrupt where a Ctrl-C arrived, whatever became of it.

        Outside of a step's own code Dagster's handler only notes a Ctrl-C, and its note is dropped where the run ends
        before somebody looks at it (`dagster._utils.interrupts.capture_interrupts`). Inside, a library may take what
        is raised for a fault of its own.
        """
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt

    def close(self) -> None:
        """Send no signal again that waits for a safe point: its handler is gone."""
        self._active = False

    def at_a_safe_point(self, handler: Any) -> Any:
        """A signal handler that calls `handler` where that is safe, and else has the signal sent again a little
        later."""
        if not callable(handler) or getattr(handler, "waits_for_a_safe_point", False):
            return handler

        def handle(number: int, frame: FrameType | None) -> None:
            self.pending = True
            at = frame
            while at is not None:
                if str(at.f_globals.get("__name__", "")).startswith(_UNSAFE):
                    again = threading.Timer(_ASK_AGAIN_SECONDS, self._send, (number,))
                    again.daemon = True
                    again.start()
                    return
                at = at.f_back
            handler(number, frame)

        handle.waits_for_a_safe_point = True  # type: ignore[attr-defined]
        return handle

    def _send(self, number: int) -> None:
        if self._active and self.pending:
            os.kill(os.getpid(), number)


@contextmanager
def interrupts_at_safe_points() -> Iterator[Interrupts]:
    """Within the context Ctrl-C waits until the main thread is outside of Dagster's storage, its database driver and
    any import; `raise_pending` of what is yielded is to be called after each run.

    dagster 1.13 puts handlers of its own in place while a run executes (`dagster._utils.interrupts`), which raise
    wherever the program is, in the clean-up of a database connection too; there is no public way to say when.
    """
    found = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    try:
        from dagster._utils import interrupts
    except ImportError as error:
        raise LibraryChanged("dagster", "dagster._utils.interrupts") from error
    if not hasattr(interrupts, "_replace_interrupt_signal"):
        raise LibraryChanged("dagster", "dagster._utils.interrupts._replace_interrupt_signal")
    replace = interrupts._replace_interrupt_signal
    before = signal.getsignal(signal.SIGINT)
    interrupts._replace_interrupt_signal = lambda handler: replace(found.at_a_safe_point(handler))
    signal.signal(signal.SIGINT, found.at_a_safe_point(before))
    try:
        yield found
    finally:
        found.close()
        interrupts._replace_interrupt_signal = replace
        signal.signal(signal.SIGINT, before)
