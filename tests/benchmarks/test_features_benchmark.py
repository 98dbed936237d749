"""The feature benchmarks in small: what they print, and that their yardsticks do what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import common, features, features_gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """As the benchmark's own process has it."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


def test_features_prints_ratios_and_fidelity(capsys):
    features.main(["--quick", "--json", "--generated"])
    report = json.loads(capsys.readouterr().out)
    assert report["rows_from"] == "generated" and report["output_dimension"] == 256
    (figures,) = report["models"].values()
    # Random signs for every parameter and dimension are work that the loop without projection does not do.
    assert figures["ratio_less"] > figures["ratio_less_without_projection"] > 0
    for name in ("plain", "less", "less_without_projection"):
        low, high = figures[f"ratio_{name}_range"]
        assert 0 < low <= figures[f"ratio_{name}"] <= high
    assert figures["ratio_bergson"] is None and "--peers" in figures["ratio_bergson_reason"]
    fidelity = figures["fidelity"]
    assert fidelity["autograd_relative_error"]["fp32"] <= 1e-4
    assert 0 < fidelity["autograd_relative_error"]["fp64"] <= 1e-9
    assert fidelity["directional_derivative_relative_error"] <= 1e-2
    for sketch in fidelity["sketch"].values():
        assert abs(sketch["bias_in_standard_errors"]) < 5
        assert 0.5 < sketch["rms_error_times_sqrt_dim"] < 1.3
        assert sketch["top_overlap"] <= sketch["top_overlap_reranked"] <= 1
        assert 0 < sketch["spearman"] <= 1
    assert fidelity["reranking"]["cost_over_gradient_pass"] > 0


def test_a_pretrained_model_is_loaded_from_its_folder_with_its_own_template(tmp_path, capsys, monkeypatch):
    records = common.generate_pool(40)
    tokenizer = common.train_tokenizer(records, features.QUICK_MODEL.vocabulary)
    tokenizer.chat_template = common.CHAT_TEMPLATE.replace("{{ message", "{{ '>>>>' }}{{ message", 1)
    tokenizer.save_pretrained(tmp_path / "smollm2")
    common.make_base(features.QUICK_MODEL).to(torch.bfloat16).save_pretrained(tmp_path / "smollm2")
    timed, adapt = [], features.adapt
    monkeypatch.setattr(features, "adapt", lambda base, kind: timed.append((base, kind)) or adapt(base, kind))
    arguments = ["--models", "smollm2", "--models-folder", str(tmp_path)]
    features.main([*arguments, "--quick", "--json", "--generated"])
    report = json.loads(capsys.readouterr().out)
    assert list(report["models"]) == ["smollm2"]
    figures = report["models"]["smollm2"]
    ((base, kind),) = timed
    assert base.dtype == torch.float32 and kind.folder == tmp_path / "smollm2"
    assert figures["parameters"] == common.make_base(features.QUICK_MODEL).num_parameters()
    assert figures["vocabulary"] == features.QUICK_MODEL.vocabulary and figures["rows"] == 4
    assert figures["ratio_plain"] > 0 and figures["ratio_less"] > figures["ratio_less_without_projection"]
    error = figures["fidelity"]["autograd_relative_error"]
    assert error["fp32_from_fp64"] <= 1e-4 and 0 < error["autograd_fp32_from_fp64"] <= 1e-4
    assert error["fp64"] <= 1e-9 and "sketch" not in figures["fidelity"]
    pool = common.generate_pool(1000)
    shuffled = [pool[index] for index in np.random.default_rng(0).permutation(len(pool))]
    _, own = common.encode(tokenizer, shuffled, 4)
    assert figures["mean_tokens"] == np.mean([len(example.input_ids) for example in own])
    assert tokenizer.decode(own[0].input_ids).startswith(">>>>")


def test_few_rows_of_a_pretrained_model_and_generated_models_alone_by_default(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(features, "benchmark", lambda models, *_: asked.append(models) or {})
    (tmp_path / "gemma3_270m").mkdir()
    (tmp_path / "gemma3_270m" / "config.json").touch()  # so that nothing is fetched
    features.main(["--generated"])
    features.main(["--generated", "--models", "gemma3_270m", "--models-folder", str(tmp_path), "--rounds", "3"])
    features.main(["--generated", "--models", "gemma3_270m", "--models-folder", str(tmp_path), "--rows", "7"])
    default, real, rows = asked
    assert list(default) == list(features.MODELS)
    assert all(options == features.Options() for _, options in default.values())
    ((kind, options),) = real.values()
    assert kind.folder == tmp_path / "gemma3_270m" and options.rounds == 3
    assert options.rows == features.FEW_ROWS["rows"] and options.batch_sizes == (1, 2, 4)
    assert rows["gemma3_270m"][1].rows == 7


def test_peak_memory_of_an_arm(tmp_path, capsys):
    records = common.generate_pool(40)
    tokenizer = common.train_tokenizer(records, features.QUICK_MODEL.vocabulary)
    kept, _ = common.encode(tokenizer, records, 4)
    base = common.make_base(features.QUICK_MODEL)
    base.save_pretrained(tmp_path / "base")
    model = common.adapt(base, features.QUICK_MODEL)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    features.write_records(tmp_path / "rows.jsonl", kept)
    for arm in ("ours", "plain", "less"):
        features.print_memory(arm, tmp_path, 64, 2)
        figures = json.loads(capsys.readouterr().out)
        assert 100 * 2**20 < figures["peak_bytes"] < 2**36
        assert 0 <= figures["beyond_the_loaded_model_bytes"] < figures["peak_bytes"]


def test_resident_memory_is_read_now_and_at_most():
    ballast = np.ones(2**26)  # 512 MiB
    with_ballast = common.resident_bytes("VmRSS")
    del ballast
    now, most = common.resident_bytes("VmRSS"), common.resident_bytes("VmHWM")
    # The kernel's counters lag by some pages.
    assert with_ballast - now > 400 * 2**20 and most - now > 400 * 2**20


def test_generated_rows_have_the_lengths_of_a_real_pool():
    pool = common.generate_pool(2000)
    for texts, expected in (
        ([record.prompt for record in pool], common.PROMPT_CHARACTERS),
        ([record.completion for record in pool], common.COMPLETION_CHARACTERS),
    ):
        found = np.percentile([len(text) for text in texts], common.PERCENTILES[2:9])
        np.testing.assert_allclose(found, expected[2:9], rtol=0.15, atol=2)
    assert common.generate_pool(5) == pool[:5]


def test_the_dense_projection_keeps_inner_products():
    vectors = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    projected = features.dense_rademacher(vectors, 4096) / 64
    torch.testing.assert_close(projected @ projected.t(), vectors @ vectors.t(), rtol=0.1, atol=40)
    with torch.no_grad():
        signs = features.dense_rademacher(torch.eye(8), 300)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(signs[:, :128], signs[:, 128:256])  # each block has signs of its own


def test_features_gpu_runs_its_code_path_on_a_cpu(capsys):
    features_gpu.main(["--device", "cpu", "--tiny", "--json", "--rows", "6", "--rounds", "2"])
    report = json.loads(capsys.readouterr().out)
    assert report["cosine_with_autograd"] > 0.9999
    assert report["top_k"]["equal_to_a_full_sort"]
    for arm in ("ours", "plain", "plain_unmasked"):
        assert report["arms"][arm]["examples_per_second"] > 0
        assert 0 < report["arms"][arm]["share_of_peak"] < 10
    assert report["ratio_plain"] > 0 and report["ratio_plain_unmasked"] > 0


def test_exact_top_k_has_no_limit_and_breaks_ties_by_row():
    rows = torch.tensor([[1.0], [3.0], [2.0], [3.0], [0.0], [3.0], [2.0]])
    scores, numbers = features_gpu.exact_top_k(iter(rows.half().split(2)), torch.ones(1), 5)
    assert numbers.tolist() == [1, 3, 5, 2, 6] and scores.tolist() == [3, 3, 3, 2, 2]
    _, numbers = features_gpu.exact_top_k(iter(rows.split(3)), torch.ones(1), 100)
    assert sorted(numbers.tolist()) == list(range(7))


def test_counted_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    scale = features_gpu.TINY
    model = features_gpu.make_model(scale, torch.device("cpu"), torch.float32)
    examples = [features_gpu.Example(np.arange(16, dtype=np.int32), np.arange(16) >= 4)]
    run = features_gpu.plain_pass(model, examples, 100, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        run()
    # Attention is counted apart (whole, not causal, there); the first layer asks for no input gradient.
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = 7 * 16**2 * scale.shape.heads * scale.shape.head_dim * scale.shape.layers
    expected = features_gpu.operations(scale.shape, scale.rank, examples)["plain"] - attention
    assert 0.85 * expected < counted <= expected


def test_features_gpu_says_when_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        features_gpu.main(["--json"])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and "needs a CUDA device" in printed.err and not printed.out


def test_features_gpu_needs_nothing_of_the_pipeline():
    listed = subprocess.run(
        [sys.executable, "-c", "import sys, benchmarks.features_gpu; print(*sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = set(listed.stdout.split())
    assert "prism_assets.gradients.engine" in loaded  # or the names below would be absent for nothing
    assert not loaded & {"dagster", "duckdb", "faiss", "prism_assets.resources", "prism_assets.stage"}
