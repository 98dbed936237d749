"""Adam's moments from a training of the user's own: against the optimiser in memory, by name; what is refused."""

import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from prism_assets.errors import UnreadableFile
from prism_assets.gradients.engine import GradientEngine
from prism_assets.gradients.preconditioner import Moments, Preconditioner
from prism_assets.resources.model import LanguageModel
from prism_assets.resources.model.optimizer_place import content_hash, locate
from prism_assets.sft.checkpoints import trainable_lora_names
from prism_assets.sft.optimizer_state import canonical, read_optimizer_state

STEPS = 4


def examples():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, 40, (16, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def with_lora(tiny_model, modules):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    return get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=modules, task_type="CAUSAL_LM"))


def train(tiny_model, folder, **options):
    """A run of the transformers Trainer with LoRA by PEFT, saved at its last step: the Trainer."""
    torch.manual_seed(0)
    # Layers of different shapes, and pairs of the same shape.
    model = with_lora(tiny_model, ["q_proj", "v_proj", "up_proj", "down_proj"])
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **{"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7, "weight_decay": 0.1, **options},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples())
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A training, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer = train(tiny_model, folder)
    return trainer, folder / f"checkpoint-{STEPS}"


@pytest.fixture
def checkpoint(run, tmp_path):
    """A copy of the checkpoint that a test may change."""
    return shutil.copytree(run[1], tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def adapted(tiny_model, run):
    """The model with the adapter of the run, as this project loads it."""
    model = LanguageModel(name=str(tiny_model), device="cpu", adapter=str(run[1]), adapter_base=str(tiny_model))
    with model.adapted(rank=1, alpha=1, target_modules="all-linear") as found:
        yield found


def in_memory(trainer):
    """What the optimiser holds of each parameter, by canonical name."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        name.replace(".default", ""): optimizer.state[parameter]
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


def changed(checkpoint, change):
    """The checkpoint after `change(state)` of its optimizer.pt."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state = change(state) or state
    torch.save(state, checkpoint / "optimizer.pt")
    return checkpoint


def assert_is_in_memory(found, expected):
    assert list(sorted(found.exp_avg)) == sorted(expected) and len(expected) == 8
    for name, state in expected.items():
        assert torch.equal(found.exp_avg[name], state["exp_avg"]), name
        assert torch.equal(found.exp_avg_sq[name], state["exp_avg_sq"]), name
        assert found.step == int(state["step"]) == STEPS
    assert found.betas == (0.8, 0.95) and found.eps == 1e-7 and found.learning_rate == 1e-2


# -- what is read -------------------------------------------------------------------------------------------------


def test_the_trainers_optimizer_pt_gives_what_the_optimiser_holds_by_name(run, adapted):
    trainer, folder = run
    expected = in_memory(trainer)
    found = read_optimizer_state(folder, adapted)
    assert_is_in_memory(found, expected)
    assert found.form == "the Trainer's order of the model's parameters"
    shapes = [tuple(value.shape) for value in found.exp_avg.values()]
    assert len(set(shapes)) < len(shapes)  # shapes alone would not have told them apart
    assert read_optimizer_state(folder / "optimizer.pt", adapted).exp_avg.keys() == expected.keys()


def test_a_parameter_that_is_not_decayed_is_looked_for_in_the_second_group(run, adapted, checkpoint, monkeypatch):
    """The Trainer decays every LoRA matrix; were one not, every position would move."""
    trainer, _ = run
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    moved = names[2]
    optimizer = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    by_name = {name.replace(".default", ""): value for name, value in in_memory(trainer).items()}
    order = [name for name in names if name != moved] + [moved]

    def regroup(state):
        state["state"] = {index: by_name[canonical(name)] for index, name in enumerate(order)}
        first, second = state["param_groups"]
        first["params"], second["params"] = list(range(len(order) - 1)), [len(order) - 1]

    changed(checkpoint, regroup)
    with pytest.raises(UnreadableFile, match=r"in groups of 7 and 1 parameters.*would have 8 and 0"):
        read_optimizer_state(checkpoint, adapted)
    monkeypatch.setattr("prism_assets.sft.optimizer_state.names_with_decay", lambda _: [n for n in names if n != moved])
    assert_is_in_memory(read_optimizer_state(checkpoint, adapted), in_memory(trainer))
    assert optimizer is not None


def test_names_in_the_file_count_more_than_positions(run, adapted, checkpoint):
    trainer, _ = run
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad][::-1]

    def rename(state):
        state["state"] = {index: in_memory(trainer)[canonical(name)] for index, name in enumerate(names)}
        state["param_groups"] = [{**state["param_groups"][0], "params": [*range(8)], "param_names": names}]

    found = read_optimizer_state(changed(checkpoint, rename), adapted)
    assert found.form == "names in the file"
    assert_is_in_memory(found, in_memory(trainer))


@pytest.fixture(scope="module")
def one_process():
    """A process group of this process alone."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def fsdp(tiny_model, run, one_process, tmp_path_factory):
    """A training under FSDP2 in one process: its optimiser's states, as accelerate saves them, and those in memory."""
    from torch.distributed.fsdp import fully_shard

    model = train(tiny_model, tmp_path_factory.mktemp("other")).model  # the same parameters as those of `run`
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.95), eps=1e-7)
    for start in range(0, 4 * STEPS, 4):
        ids = torch.stack([one["input_ids"] for one in examples()[start : start + 4]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("fsdp")
    sharded = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(sharded, storage_writer=dcp.FileSystemWriter(folder / "sharded" / "optimizer_0"))
    (folder / "full").mkdir()
    whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    torch.save(whole, folder / "full" / "optimizer.bin")
    expected = {
        canonical(name): {
            key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in one.items()
        }
        for name, one in sharded["optimizer"]["state"].items()
    }
    return folder, expected


@pytest.mark.parametrize("form", ["sharded", "full", "sharded/optimizer_0", "full/optimizer.bin"])
def test_a_state_of_fsdp_gives_what_the_optimiser_holds_by_name(fsdp, adapted, form):
    folder, expected = fsdp
    assert sum(float(one["exp_avg"].abs().sum()) for one in expected.values()) > 0
    found = read_optimizer_state(folder / form, adapted)
    assert_is_in_memory(found, expected)
    assert found.form == "names in the file"


def test_the_preconditioner_is_that_of_the_users_next_step(run, adapted):
    """AdamW's own step with the gradient of one example, weight decay and rate aside, is `adam_step`'s row."""
    trainer, folder = run
    engine, state = GradientEngine(adapted), read_optimizer_state(folder, adapted)
    moments = {name: Moments(state.exp_avg[name], state.exp_avg_sq[name]) for name in state.exp_avg}
    found = Preconditioner.build("adam_step", moments, step=state.step, betas=state.betas, eps=state.eps)
    generator = torch.Generator().manual_seed(1)
    for name, shape in engine.parameter_shapes.items():
        gradient = torch.randn(shape, generator=generator) * 1e-2
        parameter = torch.nn.Parameter(torch.zeros(shape))
        optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.0)
        optimizer.state[parameter] = {key: value.clone() for key, value in in_memory(trainer)[name].items()}
        parameter.grad = -gradient  # of the loss
        optimizer.step()
        torch.testing.assert_close(found.apply(name, gradient[None])[0], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_the_adapter_is_taken_as_it_is(run, adapted):
    checkpoint = read_optimizer_state(run[1], adapted).at(adapted)
    weights = load_file(run[1] / "adapter_model.safetensors")
    assert checkpoint.lora_state.keys() == weights.keys() == trainable_lora_names(adapted).keys()
    assert all(torch.equal(checkpoint.lora_state[name], value) for name, value in weights.items())
    assert checkpoint.optimizer_step == STEPS


# -- what is refused ----------------------------------------------------------------------------------------------

LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"


def drop(state):
    del state["state"][0]["exp_avg_sq"]


def lose(state):
    del state["state"][3]


def reshape(state):
    state["state"][0]["exp_avg"] = torch.zeros(5, 16)


def step_apart(state):
    state["state"][5]["step"] = torch.tensor(2.0)


def no_step(state):
    for entry in state["state"].values():
        entry["step"] = torch.tensor(0.0)


def amsgrad(state):
    state["param_groups"][0]["amsgrad"] = True


def two_betas(state):
    first, _ = state["param_groups"]
    names = [f"{LORA_A}.{number}.weight" for number in range(8)]
    state["param_groups"] = [
        {**first, "params": [0], "param_names": names[:1]},
        {**first, "params": [*range(1, 8)], "param_names": names[1:], "betas": (0.9, 0.999)},
    ]


def eight_bits(state):
    for entry in state["state"].values():
        entry["state1"] = entry.pop("exp_avg").to(torch.uint8)


def one_group(state):
    state["param_groups"] = [{**state["param_groups"][0], "params": [*range(8)]}]


def not_finite(state):
    state["state"][1]["exp_avg"][0, 0] = float("nan")


def negative(state):
    state["state"][1]["exp_avg_sq"][0, 0] = -1.0


def other_names(state):
    names = [f"base_model.model.model.layers.7.self_attn.q_proj.lora_A.{number}.weight" for number in range(8)]
    state["param_groups"] = [{**state["param_groups"][0], "params": [*range(8)], "param_names": names}]


def no_betas(state):
    for group in state["param_groups"]:
        del group["betas"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop, rf"has no exp_avg_sq of {LORA_A}.weight: only states of Adam"),
        (lose, r"has no state of base_model.*: the optimiser has not taken a step with it"),
        (reshape, rf"has exp_avg of {LORA_A}.weight of shape \(5, 16\), the parameter has \(3, 16\)"),
        (step_apart, r"has taken 2 steps of base_model.* and 4 of base_model"),
        (no_step, r"has taken 0 steps of .*: there are no moments yet"),
        (amsgrad, "amsgrad"),
        (two_betas, "has base_model.* twice|different betas"),
        (eight_bits, r"an optimiser of bitsandbytes \(state1 of .*optim='adamw_torch'"),
        (one_group, r"positions in place of names, in groups of 8 parameters.*would have 8 and 0"),
        (not_finite, "has exp_avg of .* not finite"),
        (negative, "has exp_avg_sq of .* negative"),
        (other_names, "twice"),
        (no_betas, "without betas and eps"),
        (lambda state: {"weights": 1}, "is no optimiser's state_dict"),
        (lambda state: {"state": {}, "param_groups": []}, "has no parameter groups"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_the_tensor(checkpoint, adapted, change, reason):
    with pytest.raises(UnreadableFile, match=reason):
        read_optimizer_state(changed(checkpoint, change), adapted)


def test_a_state_of_another_adapter_is_refused(tiny_model, adapted, checkpoint):
    weights = load_file(checkpoint / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, checkpoint / "adapter_model.safetensors")
    with pytest.raises(
        UnreadableFile, match=r"adapter_model.safetensors: has other values of .*lora_A.weight than model"
    ):
        read_optimizer_state(checkpoint, adapted)
    (checkpoint / "adapter_model.safetensors").unlink()
    with pytest.raises(UnreadableFile, match=r"in groups of 8 and 0 parameters.*would have 4 and 0"):
        read_optimizer_state(checkpoint, with_lora(tiny_model, ["q_proj", "v_proj"]))


def test_a_named_state_without_a_parameter_names_it(fsdp, tiny_model):
    folder, _ = fsdp
    other = with_lora(tiny_model, ["q_proj", "k_proj"])
    for form in ("sharded", "full"):
        with pytest.raises(UnreadableFile, match=r"has no .*k_proj.lora_A.weight \(2 are missing\) and .*_proj.lora_A"):
            read_optimizer_state(folder / form, other)


class Runs:
    """Unpickled, it writes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nothing_in_a_file_is_run(run, adapted, checkpoint, fsdp, tmp_path):
    traces = [tmp_path / name for name in ("of_file", "of_metadata", "of_values")]
    changed(checkpoint, lambda state: {**state, "more": Runs(traces[0])})
    with pytest.raises(UnreadableFile, match="cannot be read as tensors and plain values"):
        read_optimizer_state(checkpoint, adapted)
    sharded = shutil.copytree(fsdp[0] / "sharded", tmp_path / "sharded")
    (sharded / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Runs(traces[1])))
    with pytest.raises(UnreadableFile, match="its metadata hold posix.mkdir"):
        read_optimizer_state(sharded, adapted)
    state = {"state": {"a": {"exp_avg": torch.zeros(2)}}, "param_groups": [{"params": ["a"], "betas": Runs(traces[2])}]}
    dcp.save({"optimizer": state}, storage_writer=dcp.FileSystemWriter(tmp_path / "values"))
    with pytest.raises(UnreadableFile, match="cannot be read as a distributed checkpoint"):
        read_optimizer_state(tmp_path / "values", adapted)
    assert not any(trace.exists() for trace in traces)


def test_a_damaged_file_is_named(run, adapted, checkpoint, fsdp, tmp_path):
    data = (checkpoint / "optimizer.pt").read_bytes()
    (checkpoint / "optimizer.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableFile, match="optimizer.pt: cannot be read as tensors"):
        read_optimizer_state(checkpoint, adapted)
    sharded = shutil.copytree(fsdp[0] / "sharded", tmp_path / "sharded")
    (sharded / "optimizer_0" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UnreadableFile, match="optimizer_0: cannot be read as a distributed checkpoint"):
        read_optimizer_state(sharded, adapted)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], r"holds no optimizer.pt, optimizer.bin, optimizer_0: was the checkpoint saved with save_only_model"),
        (["optimizer.pt", "optimizer.bin"], "holds optimizer.pt and optimizer.bin"),
        (["global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed"),
        (["optimizer_0_rank0.bin"], "a file for each process"),
    ],
)
def test_a_folder_without_one_state_is_refused(tmp_path, files, reason):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UnreadableFile, match=reason):
        locate(tmp_path)
    with pytest.raises(UnreadableFile, match="names nothing that is there"):
        locate(tmp_path / "nowhere")


def test_the_hash_is_of_the_content_and_not_of_the_place(run, checkpoint, fsdp, tmp_path):
    assert content_hash(checkpoint, None) == content_hash(run[1] / "optimizer.pt", None)
    sharded = shutil.copytree(fsdp[0] / "sharded", tmp_path / "sharded")
    assert content_hash(sharded, None) == content_hash(fsdp[0] / "sharded", None)
    changed(checkpoint, lambda state: state["state"][0]["exp_avg"].add_(1) is None)
    assert content_hash(checkpoint, None) != content_hash(run[1], None)
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == STEPS
