"""Memory is planned: what a pass keeps is measured, batches are halved and activations recomputed to fit what is
free."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from test_engine import make_examples, make_model
from torch.profiler import ProfilerActivity, profile

from prism_assets.gradients import memory
from prism_assets.gradients.batching import build_batch
from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.memory import Activations, MemoryLimit
from prism_assets.gradients.sketch import Sketch


class Example:
    def __init__(self, length: int) -> None:
        self.input_ids = np.arange(length, dtype=np.int32) % 20
        self.loss_mask = np.arange(length) > 0


def live_bytes(run) -> int:
    """What the allocator has handed out and not taken back while `run`'s result is alive, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    del result
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_what_a_pass_keeps_is_foretold_from_two_short_ones(family):
    engine = GradientEngine(make_model(family))
    foretold = engine._runner._activations
    assert foretold.layers == 2
    length = 120
    batch = build_batch([Example(length + 1)], [0], engine.device)

    def forward():
        with engine._prepared(), torch.enable_grad():
            return engine._token_log_probs(batch)

    live = live_bytes(forward)
    needed = foretold.needed(1, length, recompute=False) - memory.FIXED_BYTES
    # Kept and the largest of what was freed on the way: below the need, and the need is no guess of twice the size.
    assert 0.5 * needed < live < needed
    assert foretold.needed(1, length, True) < foretold.needed(1, length, False)


def test_batches_are_halved_and_single_examples_recomputed_to_fit_what_is_free(monkeypatch):
    model, examples = make_model("llama"), [Example(40) for _ in range(8)]
    expected = GradientEngine(model).feature_rows(examples, sketch=Sketch(64, 0))
    engine = GradientEngine(model, token_budget=10**6)
    keeps = engine._runner._activations

    def run(free: float) -> list[tuple[int, bool]]:
        seen = []
        prepared = GradientEngine._prepared
        monkeypatch.setattr(MemoryLimit, "free", lambda self: free)
        monkeypatch.setattr(
            GradientEngine,
            "_prepared",
            lambda self, *, recompute=False, training=False: (
                seen.append(recompute) or prepared(self, recompute=recompute, training=training)
            ),
        )
        batches = []
        original = GradientEngine._token_log_probs
        monkeypatch.setattr(
            GradientEngine,
            "_token_log_probs",
            lambda self, batch: batches.append(len(batch.positions)) or original(self, batch),
        )
        found = engine.feature_rows(examples, sketch=Sketch(64, 0))
        monkeypatch.undo()
        np.testing.assert_allclose(found.rows, expected.rows, atol=1e-5 * expected.norms.max())
        return list(zip(batches, seen, strict=True))

    width = 39
    assert run(keeps.needed(8, width, False) + 1) == [(8, False)]
    assert run(keeps.needed(8, width, False) - 1) == [(4, False)] * 2
    assert run(keeps.needed(1, width, False) + 1) == [(1, False)] * 8
    assert run(keeps.needed(1, width, False) - 1) == [(1, True)] * 8
    with pytest.raises(
        MemoryError, match=r"example 0 alone \(39 tokens\) .* needs about 0.06 GiB and 0.06 GiB are left"
    ):
        run(keeps.needed(1, width, True) - 1)


def test_an_example_longer_than_the_token_budget_is_recomputed_although_there_is_room(monkeypatch):
    model = make_model("llama")
    examples = [Example(40), Example(20), Example(20)]
    expected = GradientEngine(model, token_budget=10**6, recompute=False).feature_rows(examples, sketch=Sketch(64, 0))
    engine, seen, prepared = GradientEngine(model, token_budget=38), [], GradientEngine._prepared
    keeps = engine._runner._activations
    monkeypatch.setattr(
        GradientEngine,
        "_prepared",
        lambda self, *, recompute=False, training=False: (
            seen.append(recompute) or prepared(self, recompute=recompute, training=training)
        ),
    )
    found = engine.feature_rows(examples, sketch=Sketch(64, 0))
    assert seen == [True, False]  # 39 tokens; twice 19
    np.testing.assert_allclose(found.rows, expected.rows, atol=1e-5 * expected.norms.max())
    assert engine.memory_need([39, 19, 19]).planned == max(keeps.needed(1, 39, True), keeps.needed(2, 19, False))


def test_a_forward_pass_alone_keeps_nothing_and_is_not_halved(monkeypatch):
    monkeypatch.setattr(MemoryLimit, "free", lambda self: 0)
    examples = make_examples(4)
    assert np.isfinite(GradientEngine(make_model("llama")).mean_log_probs(examples)).all()


def test_a_host_that_gives_no_more_memory_is_met_by_halving_and_recomputing():
    """A real limit of the operating system, hit in spite of the plan: in a process of its own."""
    code = """
    import resource, sys
    sys.path.insert(0, {folder!r})
    import numpy as np, torch
    torch.set_num_threads(1)
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from prism_assets.gradients.engine import GradientEngine
    from prism_assets.gradients.memory import MemoryLimit, release_memory
    from test_memory import Example

    config = LlamaConfig(vocab_size=20, hidden_size=128, intermediate_size=512, num_hidden_layers=8,
                         num_attention_heads=4, max_position_embeddings=4096)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    examples = [Example(1001) for _ in range(4)]
    expected = GradientEngine(model, token_budget=1000).weighted_gradient(examples, np.ones(4))
    engine = GradientEngine(model, token_budget=10**6)
    keeps = engine._runner._activations
    MemoryLimit.fits = lambda self, needed: True  # no plan
    release_memory(torch.device("cpu"))  # what was freed may be taken again beside the limit
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    for allowed in (keeps.needed(1, 1000, False), keeps.needed(1, 1000, True) + 2**27):
        resource.setrlimit(resource.RLIMIT_AS, (mapped + int(allowed), resource.RLIM_INFINITY))
        found = engine.weighted_gradient(examples, np.ones(4))
        errors = [(found.gradient[n] - g).norm() / g.norm() for n, g in expected.gradient.items() if g.norm() > 0]
        print(bool(max(errors) < 1e-4), engine._runner._fits_tokens, engine._runner._fits_kept)
    """
    code = textwrap.dedent(code).format(folder=str(__import__("pathlib").Path(__file__).parent))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    first, second = run.stdout.split("\n")[:2]
    assert first.startswith("True") and int(first.split()[1]) < 4000  # halved
    assert second.startswith("True")


def test_a_limit_counts_what_the_process_holds_and_leaves_a_tenth_of_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "_on_host", lambda device: (1000, 300))
    cpu = torch.device("cpu")
    assert MemoryLimit(cpu).free() == 900
    assert MemoryLimit(cpu, 800).free() == 500
    assert MemoryLimit(cpu, 5000).free() == 900
    assert MemoryLimit(cpu, 200).free() == -100


def test_control_groups_count_from_a_process_s_own_up_to_the_root(tmp_path):
    inner = tmp_path / "fs" / "user" / "job"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/user/job\n")
    for folder, limit, used, cached in ((inner, "max", 10, 0), (inner.parent, "1000", 900, 300)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    assert min(memory._control_groups(tmp_path / "fs", tmp_path / "cgroup")) == 400
    assert memory._control_groups(tmp_path / "none", tmp_path / "nothing") == [sys.maxsize]


def test_attention_weights_that_are_kept_grow_with_the_square():
    eager = make_model("llama")
    eager.get_base_model().config._attn_implementation = "eager"
    assert GradientEngine(eager)._runner._activations.per_pair > 0
    flat = Activations(per_token=10.0, per_pair=0.0, per_layer_input=1.0, layers=2)
    square = Activations(per_token=10.0, per_pair=1.0, per_layer_input=1.0, layers=2)
    fixed = memory.FIXED_BYTES
    assert square.needed(1, 100, False) - fixed == pytest.approx(11 * (flat.needed(1, 100, False) - fixed))


@pytest.mark.parametrize(("recompute", "budget"), [(None, 200), (True, 64), (False, 64)])
def test_the_need_of_a_plan_is_that_of_its_largest_batch_and_at_least_that_of_the_longest_example(recompute, budget):
    engine = GradientEngine(make_model("llama"), token_budget=budget, recompute=recompute)
    lengths = [90, 33, 33, 30, 12, 5]
    keeps = engine._runner._activations
    batches = [(2, 90), (4, 33)] if budget == 200 else [(1, 90), (1, 33), (1, 33), (2, 30), (1, 5)]
    need = engine.memory_need(lengths)
    assert need.planned == max(keeps.needed(count, width, bool(recompute)) for count, width in batches)
    assert need.least == keeps.needed(1, 90, recompute is not False)
    assert need.least <= need.planned
