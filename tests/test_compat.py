"""Each private name of another library does what is relied on; a test that fails here says what an update changed."""

import importlib
import io
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import dagster as dg
import pytest
import torch
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from prism_assets.compat import (
    MOST_INDEX_DIMENSIONS,
    NOT_PROMISED,
    TrainSampler,
    any_deps_changed,
    bars_for_terminals,
    dagster_dev,
    delete_scanner,
    forget_adapter,
    harness_yaml_loader,
    instance_without_captured_output,
    interrupts_at_safe_points,
    names_of_stacked_experts,
    names_with_decay,
    refused_by_name,
    serve_dagster_webserver,
    sleeping_while_waiting,
    use_one_device,
)
from prism_assets.errors import LibraryChanged


def tiny_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip


# -- peft ---------------------------------------------------------------------------------------------------------


def test_peft_refuses_these_names_in_these_models_alone(monkeypatch):
    from tiny_families import tiny_family
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    mamba, llama = AutoModelForCausalLM.from_config(config), tiny_family("llama")
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(mamba, LoraConfig(target_modules=["out_proj"], task_type="CAUSAL_LM"))
    assert refused_by_name(mamba, "out_proj") and not refused_by_name(mamba, "in_proj")
    assert not refused_by_name(llama, "out_proj")

    from peft.tuners import tuners_utils

    monkeypatch.delattr(tuners_utils, "_check_lora_target_modules_mamba")
    with pytest.raises(LibraryChanged, match="peft .*_check_lora_target_modules_mamba"):
        refused_by_name(llama, "q_proj")


def test_peft_takes_these_names_for_stacked_experts_wherever_they_stand(monkeypatch):
    from tiny_families import tiny_family

    names = ("gate_proj", "up_proj", "down_proj")
    # The one dense layer of a model of two: what PEFT adapts in its place are the experts of the other.
    config = LoraConfig(r=2, target_modules=[f"model.layers.0.mlp.{name}" for name in names], task_type="CAUSAL_LM")
    get_peft_model(tiny_family("deepseek_v3"), config)
    assert config.target_parameters == {"gate_up_proj", "down_proj"} and not config.target_modules
    assert set(names) <= names_of_stacked_experts("deepseek_v3")
    assert names_of_stacked_experts("llama") == names_of_stacked_experts("no such type") == frozenset()

    from peft.utils import transformers_weight_conversion

    monkeypatch.delattr(transformers_weight_conversion, "_MOE_TARGET_MODULE_MAPPING")
    with pytest.raises(LibraryChanged, match=r"peft .* tables of peft.utils.transformers_weight_conversion"):
        names_of_stacked_experts("deepseek_v3")


# -- transformers -------------------------------------------------------------------------------------------------


def test_training_arguments_count_gpus_by_the_name_that_is_set(tmp_path, monkeypatch):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 3  # as on a machine of three
    assert arguments.n_gpu == 3
    use_one_device(arguments)
    assert arguments.n_gpu == 1
    monkeypatch.setattr(TrainingArguments, "n_gpu", 3)  # a release that counts by another name
    with pytest.raises(LibraryChanged, match="transformers .* TrainingArguments._n_gpu.*constraints.txt"):
        use_one_device(arguments)


def test_the_trainer_asks_for_the_sampler_that_is_given(tmp_path):
    class Ordered(TrainSampler, Trainer):
        def train_sampler(self) -> list[int]:
            return [2, 0, 1]

    rows = [{"input_ids": torch.tensor([index, 1])} for index in range(3)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=1,
        remove_unused_columns=False,
    )  # fmt: skip
    loader = Ordered(model=tiny_model(), args=arguments, train_dataset=rows).get_train_dataloader()
    assert [int(batch["input_ids"][0, 0]) for batch in loader] == [2, 0, 1]


def test_a_trainer_that_asks_for_no_sampler_is_refused():
    class Without:
        pass

    with pytest.raises(LibraryChanged, match="Trainer._get_train_sampler"):
        type("Ordered", (TrainSampler, Without), {})


def test_the_trainers_groups_are_those_with_decay_and_those_without(tmp_path, monkeypatch):
    model = tiny_model()
    options = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "weight_decay": 0.1}
    trainer = Trainer(model=model, args=TrainingArguments(**options))
    decayed, others = trainer.create_optimizer().param_groups
    decay = set(names_with_decay(model))
    parameters = dict(model.named_parameters())
    expected = [[one for name, one in parameters.items() if (name in decay) == kind] for kind in (True, False)]
    assert expected[0] and expected[1]  # a norm's weights are not decayed
    for group, ours in zip((decayed, others), expected, strict=True):
        assert [id(one) for one in group["params"]] == [id(one) for one in ours]
    monkeypatch.setattr(Trainer, "get_decay_parameter_names", lambda model: [])
    with pytest.raises(LibraryChanged, match="get_decay_parameter_names"):
        names_with_decay(model)


def test_a_model_forgets_its_adapter():
    assert PreTrainedModel._hf_peft_config_loaded is False
    base = tiny_model()
    own = set(vars(base))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert base.peft_config is model.base_model.peft_config
    model.unload()
    base.peft_config = model.base_model.peft_config  # as peft 0.18 leaves it
    base._hf_peft_config_loaded = True  # as transformers' own `load_adapter` leaves it
    forget_adapter(base)
    assert set(vars(base)) == own and base._hf_peft_config_loaded is False


# -- lm-eval ------------------------------------------------------------------------------------------------------


def test_the_harness_reads_a_task_file_with_and_without_what_it_names(tmp_path):
    pytest.importorskip("lm_eval")
    load_yaml = harness_yaml_loader()
    (tmp_path / "base.yaml").write_text("output_type: generate_until\ntask: base\n")
    (tmp_path / "own.py").write_text("def text(row):\n    return 'read'\n")
    path = tmp_path / "task.yaml"
    path.write_text("include: base.yaml\ntask: own\ndoc_to_text: !function own.text\n")
    whole = load_yaml(path)
    assert (whole["task"], whole["output_type"], whole["doc_to_text"]({})) == ("own", "generate_until", "read")
    plain = load_yaml(path, resolve_func=False, recursive=False)
    assert plain["include"] == "base.yaml" and isinstance(plain["doc_to_text"], str) and "output_type" not in plain


def test_a_harness_without_its_yaml_loader_is_refused(monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks._yaml_loader", None)
    with pytest.raises(LibraryChanged, match="lm-eval .*_yaml_loader.load_yaml"):
        harness_yaml_loader()


# -- tqdm ---------------------------------------------------------------------------------------------------------


def test_bars_are_shown_on_terminals_alone_and_are_gone_when_full(monkeypatch):
    from tqdm import tqdm

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    before = vars(tqdm)["__init__"]
    with bars_for_terminals():
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert tqdm(range(3)).disable
        monkeypatch.setattr(sys, "stderr", Terminal())
        shown = tqdm(range(3), file=io.StringIO())
        assert (shown.disable, shown.leave) == (False, False)
        assert tqdm(range(3), disable=True).disable
        shown.close()
    assert vars(tqdm)["__init__"] is before
    assert tqdm(range(3), file=io.StringIO()).leave


def test_bars_without_the_options_are_refused(monkeypatch):
    from tqdm import tqdm

    monkeypatch.setattr(tqdm, "__init__", lambda self, iterable=None: None)
    with pytest.raises(LibraryChanged, match="tqdm .*`leave` and `disable`"), bars_for_terminals():
        pass


# -- peft ---------------------------------------------------------------------------------------------------------


def test_a_lora_layer_of_peft_holds_its_adapter_by_the_names_that_are_read():
    from peft.tuners.lora.layer import Linear, LoraLayer

    model = get_peft_model(tiny_model(), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 1 and type(layers[0]) is Linear
    layer = layers[0]
    assert layer.lora_A["default"].weight.shape == (2, 8) and layer.lora_B["default"].weight.shape == (8, 2)
    assert layer.scaling["default"] == 3.0 and layer.active_adapters == ["default"]
    assert not layer.lora_embedding_A and not layer.lora_variant and not layer.use_dora.get("default")


# -- faiss --------------------------------------------------------------------------------------------------------


def test_a_scanner_is_not_owned_by_its_wrapper_and_can_be_freed():
    import faiss

    index = faiss.IndexScalarQuantizer(4, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    scanner = index.sq.select_InvertedListScanner(faiss.METRIC_INNER_PRODUCT, None, False, None, False)
    assert not scanner.thisown  # else nothing is left to do here
    delete_scanner(scanner)


def test_a_scanner_that_cannot_be_freed_is_refused(monkeypatch):
    import faiss

    index = faiss.IndexScalarQuantizer(4, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    scanner = index.sq.select_InvertedListScanner(faiss.METRIC_INNER_PRODUCT, None, False, None, False)
    with monkeypatch.context() as changed:
        changed.delattr(faiss.InvertedListScanner, "__swig_destroy__")
        with pytest.raises(LibraryChanged, match="faiss-.*__swig_destroy__"):
            delete_scanner(scanner)
    delete_scanner(scanner)


# -- dagster ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in NOT_PROMISED.items() for name in names])
def test_dagster_has_what_it_does_not_promise(owner, name):
    module, _, attribute = owner.rpartition(".")
    assert hasattr(getattr(importlib.import_module(module), attribute), name)


def test_the_condition_of_changed_inputs_is_dagsters_own_but_for_equal_data_versions():
    """Found by the label that Dagster gives to the part that differs, the same condition comes out."""
    conditions = dg.AutomationCondition
    usual = conditions.any_deps_updated()
    part = conditions.data_version_changed() & ~conditions.executed_with_root_target()
    assert any_deps_changed() == usual.replace("newly_updated_without_root", part)
    assert any_deps_changed() != usual


def test_an_instance_without_the_condition_on_root_targets_is_refused(monkeypatch):
    monkeypatch.delattr(dg.AutomationCondition, "executed_with_root_target")
    with pytest.raises(LibraryChanged, match="AutomationCondition.executed_with_root_target"):
        any_deps_changed()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "dagster.yaml").write_text(
        "concurrency: {pools: {default_limit: 1, granularity: op}}\ntelemetry: {enabled: false}\n"
    )
    return folder


def test_an_instance_leaves_the_output_of_steps_alone(home):
    with dg.DagsterInstance.from_config(str(home)) as instance:
        captured = instance.compute_log_manager
    with instance_without_captured_output(home) as instance:
        assert type(instance.compute_log_manager).__name__ == "NoOpComputeLogManager"
        assert type(captured) is not type(instance.compute_log_manager)
        assert instance.root_directory == str(home)


def test_an_instance_that_takes_no_other_settings_is_refused(home, monkeypatch):
    from dagster._core.instance.ref import InstanceRef

    monkeypatch.setattr(InstanceRef, "from_dir", staticmethod(lambda base_dir: None))
    with pytest.raises(LibraryChanged, match="InstanceRef.from_dir.overrides"), instance_without_captured_output(home):
        pass


def started_by_dagster_dev(monkeypatch, *commands):
    """What `dagster_dev` starts where `dagster dev` asks for these commands, as it does by `open_ipc_subprocess`."""
    from dagster._cli import dev

    started = []
    monkeypatch.setattr(dev, "open_ipc_subprocess", lambda command, **more: started.append((command, more)))

    def main(options, **more):
        assert options == ["-p", "3000"]
        for command in commands:
            dev.open_ipc_subprocess(command, pass_fds=[3])

    monkeypatch.setattr(dev.dev_command, "main", main)
    dagster_dev(["-p", "3000"], ["our", "server", "--"])
    return started


def test_dagster_dev_starts_our_webserver_in_place_of_its_own_and_its_own_daemon(monkeypatch):
    daemon = [sys.executable, "-m", "dagster._daemon", "run"]
    started = started_by_dagster_dev(monkeypatch, [sys.executable, "-m", "dagster_webserver", "--port", "1"], daemon)
    assert started == [(["our", "server", "--", "--port", "1"], {"pass_fds": [3]}), (daemon, {"pass_fds": [3]})]


def test_a_webserver_that_dagster_dev_would_start_otherwise_is_not_started(monkeypatch):
    with pytest.raises(LibraryChanged, match="starts its webserver"):
        started_by_dagster_dev(monkeypatch, [sys.executable, "-m", "dagster_webserver.cli"])
    from dagster._cli import dev

    monkeypatch.setattr(dev, "dev_command_impl", lambda: None)
    with pytest.raises(LibraryChanged, match="starts its webserver"):
        started_by_dagster_dev(monkeypatch)


def test_what_is_put_before_dagsters_webserver_is_what_is_served(monkeypatch):
    import uvicorn
    from dagster_webserver import cli

    served = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **more: served.append((app, more)))
    # The very function that serves, without the application that it makes.
    monkeypatch.setattr(cli, "create_app_from_workspace_process_context", lambda *given, **more: "their app")
    monkeypatch.setattr(cli, "log_action", lambda *given: None)
    monkeypatch.setattr(cli, "uploading_logging_thread", nullcontext)
    monkeypatch.setattr(cli, "check", Mock(opt_str_param=lambda value, *given: value))

    def main(options, **more):
        assert options == ["-p", "3000"]
        cli.host_dagster_ui_with_workspace_process_context(Mock(), "127.0.0.1", 3000, "", "warning")

    monkeypatch.setattr(cli.dagster_webserver, "main", main)
    serve_dagster_webserver(["-p", "3000"], lambda app: f"guarded {app}")
    assert served == [("guarded their app", {"host": "127.0.0.1", "port": 3000, "log_level": "warning"})]


def test_a_webserver_that_would_be_served_otherwise_is_not_served(monkeypatch):
    from dagster_webserver import cli

    monkeypatch.setattr(cli.dagster_webserver, "main", lambda *given, **more: pytest.fail("served"))
    monkeypatch.setattr(cli, "host_dagster_ui_with_workspace_process_context", lambda *given: None)
    with pytest.raises(LibraryChanged, match="uvicorn.run"):
        serve_dagster_webserver([], lambda app: app)


def test_a_run_that_waits_by_other_names_is_refused():
    class Changed:
        pass

    with sleeping_while_waiting(), pytest.raises(LibraryChanged, match="InstanceConcurrencyContext._pending_timeouts"):
        InstanceConcurrencyContext.interval_to_next_pending_claim_check(Changed())


def test_a_dagster_without_interrupts_of_its_own_is_refused(monkeypatch):
    import dagster._utils

    monkeypatch.delattr(dagster._utils, "interrupts")
    monkeypatch.setitem(sys.modules, "dagster._utils.interrupts", None)
    with pytest.raises(LibraryChanged, match="dagster._utils.interrupts"), interrupts_at_safe_points():
        pass


def test_a_run_that_waits_for_a_slot_sleeps(home):
    @dg.asset(pool="model")
    def worked_on():
        pass

    job = dg.Definitions([worked_on]).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.from_config(str(home)) as instance:
        storage = instance.event_log_storage
        storage.initialize_concurrency_limit_to_default("model")
        holder = instance.create_run_for_job(job)
        assert storage.claim_concurrency_slot("model", holder.run_id, "worked_on").is_claimed
        original = InstanceConcurrencyContext.interval_to_next_pending_claim_check
        with InstanceConcurrencyContext(instance, instance.create_run_for_job(job)) as waiting:
            assert not waiting.claim("model", "worked_on")
            assert waiting.interval_to_next_pending_claim_check() <= 0  # else dagster does it by itself now
            with sleeping_while_waiting():
                assert 0 < waiting.interval_to_next_pending_claim_check() <= 15
        with sleeping_while_waiting(), InstanceConcurrencyContext(instance, instance.create_run_for_job(job)) as idle:
            assert idle.interval_to_next_pending_claim_check() == 0
        assert InstanceConcurrencyContext.interval_to_next_pending_claim_check is original


def test_an_interrupt_inside_the_database_driver_waits_until_it_is_left():
    """A function that counts as the driver's sends the signal to itself and goes on; the exception comes after it."""
    source = (
        "def query(done):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.05)\n    done.append('whole')\n"
    )
    driver = {"__name__": "sqlalchemy.engine.pretended", "os": os, "signal": signal, "time": time}
    exec(source, driver)
    done: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
    try:
        with interrupts_at_safe_points(), pytest.raises(KeyboardInterrupt):
            driver["query"](done)
            assert done == ["whole"]
            time.sleep(5)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["whole"]


def test_an_interrupt_inside_an_import_waits_until_the_module_is_whole(tmp_path, monkeypatch):
    (tmp_path / "imported_during_an_interrupt.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.05)\nWHOLE = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupts_at_safe_points(), pytest.raises(KeyboardInterrupt):
            importlib.import_module("imported_during_an_interrupt")
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sys.modules["imported_during_an_interrupt"].WHOLE


def test_an_interrupt_that_dagster_notes_and_drops_is_raised_after_the_run():
    from dagster._utils import interrupts

    with interrupts_at_safe_points() as found:
        found.raise_pending()  # nothing arrived
        with interrupts.capture_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert not interrupts.check_captured_interrupt()  # else dagster keeps it by itself now
        with pytest.raises(KeyboardInterrupt):
            found.raise_pending()
        found.raise_pending()


def test_dagsters_own_handler_waits_for_a_safe_point_too():
    from dagster._utils import interrupts

    before = interrupts._replace_interrupt_signal
    with interrupts_at_safe_points():
        with interrupts.raise_interrupts_as(RuntimeError):
            assert signal.getsignal(signal.SIGINT).waits_for_a_safe_point
            with pytest.raises(RuntimeError):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
    assert interrupts._replace_interrupt_signal is before


def test_faiss_reads_an_index_of_as_many_dimensions_as_is_said_and_none_of_more(tmp_path):
    import faiss

    for dim, reads in ((MOST_INDEX_DIMENSIONS, True), (MOST_INDEX_DIMENSIONS + 1, False)):
        path = str(tmp_path / f"{dim}.faiss")
        faiss.write_index(faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16), path)
        with nullcontext() if reads else pytest.raises(RuntimeError, match="out of range"):
            assert faiss.read_index(path).d == dim
