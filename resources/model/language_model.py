"""The language model: base weights, tokenizer and LoRA adapter, loaded once a process and known by its fingerprint."""

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prism_assets.compat import forget_adapter
from prism_assets.errors import ModelError
from prism_assets.resources.file_hashes import FileHashes
from prism_assets.resources.model import starting_adapter
from prism_assets.resources.model.identity import (
    CODE_FILES,
    DUPLICATES,
    OTHER_VOCABULARIES,
    TOKENIZER_FILES,
    VOCABULARIES,
    WEIGHT_FILES,
    ModelIdentity,
    context_length,
    matching,
    tokenizer_files,
)
from prism_assets.resources.model.lora_targets import lora_targets
from prism_assets.resources.model.quantization import kind_of, loading

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Without any of them Linux has no NVIDIA or AMD GPU that torch could see.
GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")

# One model a process: a second asset in the same process finds it here.
_loaded: dict[tuple, Any] = {}


@dataclass(frozen=True)
class LanguageModel:
    """Any Hugging Face causal language model, by hub name and revision or by folder; safetensors only.

    `known_hashes` is a file where hashes of large files are remembered, keyed by path, size and modification time.
    """

    name: str
    revision: str = "main"
    adapter: str | None = None
    adapter_base: str | None = None
    dtype: str = "auto"
    quantization: str = "none"
    device: str = "auto"
    trust_remote_code: bool = False
    known_hashes: str | None = None

    # -- identity ----------------------------------------------------------------------------------------------

    def folder(self) -> Path:
        """The folder with the model's files; a hub model is downloaded (or found in the hub's cache) first.

        Raises ModelError where there is none, with the hub's reason.
        """
        path = Path(self.name)
        if path.is_dir():
            return path
        if path.is_absolute():
            raise ModelError(f"model.name: there is no folder {path}.")
        patterns = [*WEIGHT_FILES, *TOKENIZER_FILES, *(CODE_FILES if self.trust_remote_code else ())]
        try:
            folder = self._download(patterns)
            if not any((folder / name).is_file() for name in VOCABULARIES):
                folder = self._download([*patterns, *OTHER_VOCABULARIES])
            return folder
        except Exception as error:  # the hub has a dozen exception types for "not reachable" and "no such model"
            raise ModelError(
                f"model.name: {self.name!r} (revision {self.revision}) is no folder here and cannot be loaded from the "
                f"Hugging Face hub ({type(error).__name__}: {str(error).splitlines()[0][:200]})."
            ) from error

    def _download(self, patterns: list[str]) -> Path:
        """The folder of the hub's cache with the files of these names; what is there already is not fetched again."""
        from huggingface_hub import snapshot_download

        options = {"allow_patterns": patterns, "ignore_patterns": list(DUPLICATES)}
        return Path(snapshot_download(self.name, revision=self.revision, **options))

    def identify(self) -> ModelIdentity:
        """Hash weights, tokenizer and starting adapter. Raises ModelError for a model without safetensors."""
        folder = self.folder()
        weight_files = matching(folder, WEIGHT_FILES)
        if not any(file.suffix == ".safetensors" for file in weight_files):
            pickled = [file.name for file in folder.glob("*.bin")]
            advice = (
                f" It has {pickled[0]}: convert it with `save_pretrained`; pickles are not read." if pickled else ""
            )
            raise ModelError(f"model.name: {folder} holds no .safetensors weights.{advice}")
        config = _read_config(folder)
        quantized = kind_of(self.quantization, config, folder)
        weights = self._hash(folder, weight_files)
        return ModelIdentity(
            weights=weights,
            tokenizer=self._hash(folder, tokenizer_files(folder)),
            adapter=self._hash_adapter(weights),
            architecture=(config.get("architectures") or [config.get("model_type", "unknown")])[0],
            parameters_on_disk=sum(file.stat().st_size for file in weight_files if file.suffix == ".safetensors"),
            folder=str(folder),
            context_length=context_length(config.get("text_config") or config),
            quantized=quantized,
        )

    def _hash_adapter(self, weights: str) -> str | None:
        """The hash of the starting adapter's files. Raises ModelError where it cannot be started from, or names another
        base than the one with these weights."""
        if self.adapter is None:
            return None
        folder = Path(self.adapter)
        config = starting_adapter.read_config(folder)
        starting_adapter.check_base(
            folder,
            config,
            self.name,
            self.adapter_base,
            lambda base: self._hash(base, matching(base, WEIGHT_FILES)) == weights,
        )
        return self._hash(folder, matching(folder, starting_adapter.FILES))

    def _hash(self, folder: Path, files: list[Path]) -> str:
        known = FileHashes(Path(self.known_hashes) if self.known_hashes else None)
        # The hub's cache holds links: by the file that a link leads to, its content is hashed once for all revisions.
        parts = [f"{file.relative_to(folder).as_posix()}:{known.sha256(file.resolve())}" for file in files]
        known.save()
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    # -- loading -----------------------------------------------------------------------------------------------

    def torch_device(self) -> "torch.device":
        """The device to compute on. Raises ModelError where a GPU is asked for and none answers."""
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ModelError("model.device: cuda was asked for, but torch finds no GPU. Use `device: auto` or `cpu`.")
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")

    def torch_dtype(self) -> "torch.dtype":
        """The dtype of the base weights: as asked, or for `auto` bfloat16 on a GPU and float32 on a CPU."""
        import torch

        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device().type == "cuda" else torch.float32
        return getattr(torch, self.dtype)

    def dtype_name(self) -> str:
        """`torch_dtype` as text, such as torch.float32; without loading torch where no GPU can be."""
        if self.dtype != "auto":
            return f"torch.{self.dtype}"
        no_gpu = sys.platform == "linux" and not any(Path(one).exists() for one in GPU_DEVICES)
        if self.device == "cpu" or (self.device == "auto" and no_gpu):
            return "torch.float32"
        return str(self.torch_dtype())

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        folder = self.folder()
        key = ("tokenizer", self._hash(folder, tokenizer_files(folder)))
        if key not in _loaded:
            try:
                _loaded[key] = AutoTokenizer.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
            except (OSError, ValueError, KeyError) as error:
                raise ModelError(f"model.name: no tokenizer can be loaded from {folder}: {error}") from error
        return _loaded[key]

    def base(self) -> "PreTrainedModel":
        """The base model on its device, frozen, in evaluation mode. It is shared: leave it as you found it."""
        from transformers.utils.logging import disable_progress_bar

        identity = self.identify()
        dtype, device = self.torch_dtype(), self.torch_device()
        key = ("model", identity.weights, str(dtype), identity.quantized, str(device))
        if key not in _loaded:
            _forget_model()  # one model a process: two rarely fit
            config = _read_config(Path(identity.folder))
            options = loading(identity.quantized, config, dtype, device) if identity.quantized else {}
            disable_progress_bar()  # a bar over the weights in the middle of a step's own progress
            try:
                model, info = _class_for(identity.folder, self.trust_remote_code).from_pretrained(
                    identity.folder,
                    dtype=dtype,
                    use_safetensors=True,
                    trust_remote_code=self.trust_remote_code,
                    output_loading_info=True,
                    **options,
                )
            except Exception as error:  # each library has its own for a broken model
                raise ModelError(f"model.name: {identity.folder} cannot be loaded as a causal LM: {error}") from error
            if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers
                raise ModelError(
                    f"model.name: {identity.folder} has no weights for {missing[0]} of {type(model).__name__} "
                    f"({len(missing)} tensors in all): its files are incomplete, or are those of another model."
                )
            if identity.quantized:  # on its device already: bitsandbytes moves no codes from one to another
                from prism_assets.quantized import settle

                settle(model)
            else:
                model = cast("torch.nn.Module", model).to(device)
            _loaded[key] = model.eval().requires_grad_(False)
        return _loaded[key]

    @contextmanager
    def adapted(
        self,
        *,
        rank: int,
        alpha: float,
        target_modules: str | tuple[str, ...],
        rslora: bool = False,
        exclude_modules: str | tuple[str, ...] = (),
        layers: tuple[int, ...] | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        state: "Mapping[str, torch.Tensor] | None" = None,
    ) -> "Iterator[PeftModel]":
        """The base model with a LoRA adapter: fresh (seeded) or the starting adapter, then `state` loaded into it.

        With a starting adapter its own configuration counts and the LoRA arguments are not used. The model is in
        evaluation mode (no dropout before somebody trains), and the base model is given back unchanged when the context
        ends. `state` maps canonical LoRA parameter names to tensors; `lora_targets` says which modules are adapted.
        Raises ModelError where the adapter does not fit the model.
        """
        import torch
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        base = self.base()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT asks by the old name
            torch.manual_seed(seed)
            try:
                if self.adapter:
                    model = starting_adapter.load(base, Path(self.adapter))
                else:
                    config = LoraConfig(
                        r=rank,
                        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
                        target_modules=lora_targets(base, target_modules, exclude_modules, layers).modules,
                        use_rslora=rslora,
                        lora_dropout=dropout,
                        bias="none",
                        task_type="CAUSAL_LM",
                    )
                    model = get_peft_model(base, config)
            except ModelError:
                _forget_model()  # the adapter's layers are in it
                raise
            except (ValueError, RuntimeError, KeyError) as error:
                _forget_model()  # half an adapter may be in it
                raise ModelError(f"LoRA cannot be put on {self.name}: {error}") from error
        try:
            if state is not None:
                # PEFT passes over names that it does not know; what was not loaded would be fresh and look trained.
                where = "The LoRA parameters do not fit the model's adapter"
                starting_adapter.check_fit(get_peft_model_state_dict(model), state, where)
                set_peft_model_state_dict(model, dict(state))
            yield model.eval()
        finally:
            model.unload()
            forget_adapter(base)
            base.eval().requires_grad_(False)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model.name: {folder} has no readable config.json: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"model.name: config.json in {folder} holds no object; copy the model again.")
    return config


def _class_for(folder: str, trust_remote_code: bool) -> Any:
    """The class that loads a checkpoint: that of causal LMs, or of multimodal models where only they know its kind."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _forget_model() -> None:
    for key in [key for key in _loaded if key[0] == "model"]:
        del _loaded[key]
