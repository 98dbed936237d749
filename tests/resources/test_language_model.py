"""The language model: what identifies it, what is refused, and that it is given back as it was."""

import dataclasses
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from prism_assets.errors import ModelError
from prism_assets.resources.model.language_model import LanguageModel
from prism_assets.sft.adapter_files import save_adapter

LORA = {"rank": 2, "alpha": 4, "target_modules": "all-linear"}


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def of(folder, **options):
    return LanguageModel(name=str(folder), device="cpu", **options)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(4, 14)[None]).logits


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A trained-looking adapter of the tiny model: rank 3, non-zero B."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    with of(tiny_model).adapted(rank=3, alpha=6, target_modules=("q_proj", "v_proj"), seed=5) as model:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
        save_adapter(model, folder)
    return folder


# -- identity ----------------------------------------------------------------------------------------------------


def test_identity_is_that_of_the_bytes_not_of_the_folder(folder, tmp_path):
    here = of(folder).identify()
    moved = shutil.copytree(folder, tmp_path / "another name")
    (moved / "README.md").write_text("words that decide nothing")
    os.utime(moved / "model.safetensors", (1, 1))
    assert of(moved).identify().fingerprint == here.fingerprint
    assert here.architecture == "LlamaForCausalLM"
    assert here.parameters_on_disk == (folder / "model.safetensors").stat().st_size


def test_identity_depends_on_weights_tokenizer_and_adapter(folder, adapter):
    fingerprints, tokenizers = [], []

    def note(**options):
        identity = of(folder, **options).identify()
        fingerprints.append(identity.fingerprint)
        tokenizers.append(identity.tokenizer)

    note()
    note(adapter=str(adapter))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    note()
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    note()
    edit_json(folder / "tokenizer_config.json", unk_token="?")
    note()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    note()
    assert len(set(fingerprints)) == 6
    assert len(set(tokenizers)) == 3 and len(set(tokenizers[:4])) == 1


def test_hashes_are_remembered_and_renewed_when_a_file_changes(folder, tmp_path):
    for file in folder.iterdir():
        os.utime(file, (1, 1))  # a file that was changed a moment ago is not remembered
    cached = of(folder, known_hashes=str(tmp_path / "cache" / "model-files.json"))
    first = cached.identify()
    assert first == of(folder).identify() == cached.identify()
    remembered = json.loads((tmp_path / "cache" / "model-files.json").read_text())
    assert str(folder / "model.safetensors") in remembered
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert cached.identify() == of(folder).identify() != first
    (tmp_path / "cache" / "model-files.json").write_text("{half")
    assert cached.identify() == of(folder).identify()


def test_what_was_remembered_is_not_read_again_through_links_either(folder, tmp_path, monkeypatch):
    """An older cache: {path: [size, modification time in ns, SHA-256]}, by the files that links point to."""
    found = {file: file.stat() for file in folder.iterdir()}
    entries = {str(file): [status.st_size, status.st_mtime_ns, "ab" * 32] for file, status in found.items()}
    (tmp_path / "model-files.json").write_text(json.dumps(entries))
    links = tmp_path / "links"
    links.mkdir()
    for file in folder.iterdir():
        (links / file.name).symlink_to(file)
    monkeypatch.setattr("hashlib.file_digest", None)
    assert (
        of(links, known_hashes=str(tmp_path / "model-files.json")).identify().fingerprint
        == of(folder, known_hashes=str(tmp_path / "model-files.json")).identify().fingerprint
    )
    assert json.loads((tmp_path / "model-files.json").read_text()) == entries


def test_what_identifies_a_model_is_what_it_was_in_the_first_release(folder):
    """The hash written out: names and SHA-256 of the same files, whatever else lies beside them."""
    for name in ("tekken.json", "qwen.tiktoken", "tiktoken.model", "modeling_mine.py"):
        (folder / name).write_text("beside a tokenizer.json these decide nothing")
    (folder / "original").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "original" / "consolidated.00.safetensors")

    def digest(*names):
        lines = [f"{name}:{hashlib.sha256((folder / name).read_bytes()).hexdigest()}" for name in sorted(names)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]

    found = of(folder).identify()
    assert found.weights == digest("config.json", "generation_config.json", "model.safetensors")
    assert found.tokenizer == digest("tokenizer.json", "tokenizer_config.json")


def test_a_vocabulary_of_another_kind_counts_where_it_is_the_only_one(folder):
    (folder / "tokenizer.json").unlink()
    seen = set()
    for name in ("tekken.json", "qwen.tiktoken", "tiktoken.model"):
        for content in ("one", "two"):
            (folder / name).write_text(content)
            seen.add(of(folder).identify().tokenizer)
        (folder / name).unlink()
    assert len(seen) == 6


# -- download ----------------------------------------------------------------------------------------------------

_ON_THE_HUB = [
    *("config.json", "generation_config.json", "tokenizer_config.json", "modeling_own.py", "README.md", "model.bin"),
    *("model-00001-of-00001.safetensors", "model.safetensors.index.json"),
    *("consolidated.safetensors", "consolidated.safetensors.index.json", "original/consolidated.00.safetensors"),
    *("original/config.json", "onnx/model.py", "tekken.json", "own.tiktoken"),
]


@pytest.mark.parametrize("remote_code", [False, True])
@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "tokenizer.model", None])
def test_what_is_downloaded_is_what_is_loaded(tmp_path, monkeypatch, remote_code, vocabulary):
    """The hub's own filter on a list of files, and a cache that holds what was asked for."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        files = [*_ON_THE_HUB, *([vocabulary] if vocabulary else [])]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert LanguageModel(name="org/model", trust_remote_code=remote_code).folder() == tmp_path
    expected = {"config.json", "generation_config.json", "tokenizer_config.json"}
    expected |= {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    expected |= {"modeling_own.py"} if remote_code else set()
    expected |= {vocabulary} if vocabulary else {"tekken.json", "own.tiktoken"}
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()} == expected


# -- refusals ----------------------------------------------------------------------------------------------------


def test_a_pickled_model_is_refused_with_advice(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    for use in (LanguageModel.identify, LanguageModel.base):
        with pytest.raises(ModelError, match=r"no \.safetensors weights.*pytorch_model\.bin.*save_pretrained"):
            use(of(folder))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"model\.name: there is no folder .*nowhere"):
        of(tmp_path / "nowhere").identify()


def test_a_name_that_is_neither_folder_nor_on_the_hub_is_explained(monkeypatch):
    import huggingface_hub

    def offline(name, **options):
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"'no/such-model' \(revision main\).*ConnectionError: no route to the hub\)"):
        LanguageModel(name="no/such-model").identify()


@pytest.mark.parametrize("broken", ["weights", "config"])
def test_a_broken_model_folder_gives_an_error_that_names_it(folder, broken):
    if broken == "weights":
        with open(folder / "model.safetensors", "rb+") as handle:
            handle.truncate(1000)
    else:
        (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"model\.name: .*model"):
        of(folder).base()


def test_a_folder_without_tokenizer_is_refused(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="no tokenizer can be loaded from"):
        of(folder).tokenizer()


def test_cuda_without_a_gpu_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="cuda was asked for, but torch finds no GPU"):
        LanguageModel(name=str(folder), device="cuda").torch_device()
    assert LanguageModel(name=str(folder), device="auto").torch_device() == torch.device("cpu")


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_starting_adapter_that_lacks_a_file_is_refused(folder, adapter, tmp_path, missing):
    incomplete = shutil.copytree(adapter, tmp_path / "incomplete")
    (incomplete / missing).unlink()
    with pytest.raises(ModelError, match=rf"model\.adapter: .*incomplete has no {missing}"):
        of(folder, adapter=str(incomplete)).identify()


def test_weights_that_a_checkpoint_lacks_are_named_and_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"no weights for model\.layers\.0\.mlp\.up_proj\.weight of LlamaFor.*1 tensor"
    ):
        of(folder).base()


# -- loading -----------------------------------------------------------------------------------------------------


def test_dtype_is_as_asked(folder):
    assert of(folder).torch_dtype() == torch.float32
    for dtype, device in (("auto", "auto"), ("auto", "cpu"), ("bfloat16", "auto"), ("float32", "cpu")):
        model = dataclasses.replace(of(folder), dtype=dtype, device=device)
        assert model.dtype_name() == str(model.torch_dtype())
    assert next(of(folder, dtype="bfloat16").base().parameters()).dtype == torch.bfloat16
    assert next(of(folder).base().parameters()).dtype == torch.float32


def test_the_base_model_is_loaded_once_and_frozen(folder):
    model = of(folder).base()
    assert of(folder).base() is model
    assert not model.training and not any(value.requires_grad for value in model.parameters())


def test_a_tokenizer_that_was_exchanged_in_place_is_loaded_again(folder):
    before = of(folder).tokenizer()
    assert of(folder).tokenizer() is before
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    after = of(folder).tokenizer()
    assert before.convert_tokens_to_ids("a") == after.convert_tokens_to_ids("b")
    assert before.convert_tokens_to_ids("a") != after.convert_tokens_to_ids("a")


def test_weights_that_were_exchanged_in_place_are_loaded_again(folder):
    before = logits(of(folder).base())
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert not torch.equal(logits(of(folder).base()), before)


# -- adapters ----------------------------------------------------------------------------------------------------


def test_the_base_model_comes_back_unchanged_bit_by_bit(folder):
    model = of(folder)
    base = model.base()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    before = logits(base)
    with model.adapted(**LORA) as peft_model:
        with torch.no_grad():
            for name, value in peft_model.named_parameters():
                if "lora_" in name:
                    value.add_(1)
        peft_model.train()
        assert not torch.allclose(logits(peft_model), before)
    assert torch.equal(logits(base), before)
    assert list(base.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    assert not base.training and not any(value.requires_grad for value in base.parameters())
    assert not hasattr(base, "peft_config")


def test_the_base_model_comes_back_unchanged_after_an_error(folder, adapter, tmp_path):
    model = of(folder)
    before, names = logits(model.base()), list(model.base().state_dict())
    with pytest.raises(ZeroDivisionError), model.adapted(**LORA):
        raise ZeroDivisionError
    assert torch.equal(logits(model.base()), before) and list(model.base().state_dict()) == names

    with (
        pytest.raises(ModelError, match="LoRA cannot be put on .*no_such_layer"),
        model.adapted(rank=2, alpha=4, target_modules=("no_such_layer",)),
    ):
        pass
    assert torch.equal(logits(model.base()), before) and list(model.base().state_dict()) == names

    # An adapter of another model: the layers are there, their shapes are not.
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    tensors = load_file(foreign / "adapter_model.safetensors")
    save_file({name: value.repeat(1, 2) for name, value in tensors.items()}, foreign / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="does not fit"), of(folder, adapter=str(foreign)).adapted(**LORA):
        pass
    assert torch.equal(logits(model.base()), before) and list(model.base().state_dict()) == names


def test_a_fresh_adapter_is_seeded_starts_at_zero_and_leaves_the_random_state_alone(folder):
    model = of(folder)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(99)
        with model.adapted(**LORA, seed=seed) as peft_model:
            assert torch.equal(logits(peft_model), logits(model.base()))
            states.append({k: v.clone() for k, v in get_peft_model_state_dict(peft_model).items()})
            drawn = torch.rand(3)
        torch.manual_seed(99)
        assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_a_state_is_laid_over_the_fresh_adapter(folder):
    model = of(folder)
    with model.adapted(**LORA, seed=0) as peft_model:
        state = {name: torch.randn(value.shape) for name, value in get_peft_model_state_dict(peft_model).items()}
    with model.adapted(**LORA, seed=1, state=state) as peft_model:
        found = get_peft_model_state_dict(peft_model)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("fault", ["unknown name", "missing name", "wrong shape"])
def test_a_state_that_does_not_fit_is_refused(folder, fault):
    model = of(folder)
    with model.adapted(**LORA) as peft_model:
        state = {name: value.clone() for name, value in get_peft_model_state_dict(peft_model).items()}
    before = logits(model.base())
    name = next(iter(state))
    if fault == "unknown name":
        state[name.replace("layers.0", "layers.7")] = state[name]
    elif fault == "missing name":
        del state[name]
    else:
        state[name] = state[name].repeat(2, 2)
    with pytest.raises(ModelError, match="do not fit the model's adapter"), model.adapted(**LORA, state=state):
        pass
    assert torch.equal(logits(model.base()), before)


def test_a_starting_adapter_is_continued_with_its_own_settings(folder, adapter):
    model = of(folder, adapter=str(adapter))
    stored = load_file(adapter / "adapter_model.safetensors")
    with model.adapted(**LORA) as peft_model:
        found = get_peft_model_state_dict(peft_model)
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], stored[name]) for name in stored)
        trainable = {name for name, value in peft_model.named_parameters() if value.requires_grad}
        assert trainable and all("lora_" in name for name in trainable)
        with_adapter = logits(peft_model)
    independent = PeftModel.from_pretrained(of(folder).base(), adapter)
    expected = logits(independent)
    independent.unload()
    np.testing.assert_array_equal(with_adapter, expected)
    assert not torch.allclose(with_adapter, logits(of(folder).base()))


# -- starting adapters that do not fit ---------------------------------------------------------------------------


@pytest.fixture
def changed(adapter, tmp_path):
    """Copies of the adapter with another configuration or other tensors."""

    def change(tensors=None, **config):
        copy = shutil.copytree(adapter, tmp_path / "changed")
        edit_json(copy / "adapter_config.json", **config)
        if tensors is not None:
            save_file(tensors(load_file(adapter / "adapter_model.safetensors")), copy / "adapter_model.safetensors")
        return str(copy)

    return change


def _without_q(tensors):
    return {name: value for name, value in tensors.items() if "q_proj" not in name}


def _of_two_layers(tensors):
    """The model has one layer."""
    return tensors | {name.replace("layers.0", "layers.1"): value.clone() for name, value in tensors.items()}


def _wider(tensors):
    return {name: value.repeat(1, 2) if "lora_A" in name else value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_without_q, r"q_proj\.lora_A\.weight is missing \(2 in all\)"),
        (_of_two_layers, r"layers\.1\.self_attn\.q_proj\.lora_A\.weight is unknown \(4 in all\)"),
        (_wider, r"q_proj\.lora_A\.weight has shape \(3, 32\), not \(3, 16\) \(2 in all\)"),
    ],
    ids=["a module is missing", "a layer too many", "other shapes"],
)
def test_a_starting_adapter_whose_tensors_do_not_fit_names_the_first_and_their_number(
    folder, changed, tensors, message
):
    before = logits(of(folder).base())
    with pytest.raises(ModelError, match=rf"model\.adapter: .*changed does not fit .*{message}"):
        with of(folder, adapter=changed(tensors)).adapted(**LORA):
            pass
    assert torch.equal(logits(of(folder).base()), before)


def test_a_starting_adapter_with_fewer_layers_is_refused(adapter, tmp_path):
    """The adapter of a model of one layer, on one of two."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    deeper = tmp_path / "model"
    config = LlamaConfig.from_pretrained(
        json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    config.num_hidden_layers, config.layer_types = 2, None
    AutoModelForCausalLM.from_config(config).save_pretrained(deeper)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight is missing \(4 in all\)"):
        with of(deeper, adapter=str(adapter)).adapted(**LORA):
            pass


@pytest.mark.parametrize("recorded", ["org/other-model", "/gone/other"])
def test_a_starting_adapter_of_another_base_is_refused_unless_the_settings_say_it_is_the_same(
    folder, changed, recorded
):
    other = changed(base_model_name_or_path=recorded)
    with pytest.raises(ModelError, match=rf"was trained on '{recorded}'.*`adapter_base: \"{recorded}\"`"):
        of(folder, adapter=other).identify()
    with pytest.raises(ModelError, match=rf"model\.adapter_base: 'org/typo' is not what .* '{recorded}'"):
        of(folder, adapter=other, adapter_base="org/typo").identify()
    assert of(folder, adapter=other, adapter_base=recorded).identify().adapter is not None


@pytest.mark.parametrize(
    "recorded", ["/gone/model", "org/Model", "C:\\work\\model\\", "./hub/models--org--model/snapshots/0a1b", "", None]
)
def test_a_base_that_moved_or_is_not_recorded_is_the_base(folder, changed, recorded):
    assert of(folder, adapter=changed(base_model_name_or_path=recorded)).identify().adapter is not None


def test_a_base_in_a_folder_of_another_name_is_known_by_its_weights(folder, changed, tmp_path):
    twin = shutil.copytree(folder, tmp_path / "twin")
    other = changed(base_model_name_or_path=str(twin))
    assert of(folder, adapter=other).identify().adapter is not None
    weights = load_file(twin / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="was trained on .*twin"):
        of(folder, adapter=other).identify()


@pytest.mark.parametrize(
    "kind", ["pissa", "pissa_niter_4", "PiSSA", "olora", "loftq", "corda", "lora_ga", "unheard_of"]
)
def test_an_adapter_that_would_change_the_base_is_refused_with_advice(folder, changed, kind):
    with pytest.raises(ModelError, match=rf"init_lora_weights '{kind}'.*path_initial_model_for_weight_conversion"):
        of(folder, adapter=changed(init_lora_weights=kind)).identify()


@pytest.mark.parametrize("kind", [True, False, "gaussian", "orthogonal", "eva"])
def test_a_starting_adapter_can_be_entered_again_and_again_and_the_base_keeps_every_bit(folder, changed, kind):
    """Three times: the log-probabilities are equal bit by bit. The rank is even because `orthogonal` wants it so."""
    even = changed(_rank_two, init_lora_weights=kind, r=2)
    model = of(folder, adapter=even)
    state = {name: value.clone() for name, value in model.base().state_dict().items()}
    seen = []
    for _ in range(3):
        with model.adapted(**LORA) as peft_model:
            seen.append(torch.log_softmax(logits(peft_model), -1))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert all(torch.equal(value, state[name]) for name, value in model.base().state_dict().items())


def _rank_two(tensors):
    return {n: (v[:2] if "lora_A" in n else v[:, :2]).contiguous() for n, v in tensors.items()}


def test_pissa_converted_as_advised_gives_what_pissa_gave(folder, tmp_path):
    """The advice of the refusal, followed: PEFT's own PiSSA adapter, trained, converted, and started from here."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].init_lora_weights = True  # as PEFT's example does before the first save
    model.save_pretrained(tmp_path / "before")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    with of(folder, adapter=str(tmp_path / "plain")).adapted(**LORA) as peft_model:
        torch.testing.assert_close(logits(peft_model), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_no_lora_is_refused(folder, changed):
    with pytest.raises(ModelError, match=r"has peft_type 'IA3'; only LORA"):
        of(folder, adapter=changed(peft_type="IA3")).identify()
