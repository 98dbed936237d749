"""What identifies a model: hashes of the files that decide its weights and its tokens, never names or paths."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Files that decide what the weights compute, and files that decide what the tokens are.
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"}
# Vocabularies of other tokenizers. They count, and are downloaded, where a model has none of those above: beside them
# they decide nothing, and no model that was known before is to be called otherwise.
OTHER_VOCABULARIES = ("tekken.json", "*.tiktoken", "tiktoken.model")
# The code that comes with a model, for `trust_remote_code`. It is no part of the identity: pin `revision`.
CODE_FILES = ("*.py",)
# The same weights once more, in the formats of other programs: Llama's original/, Mistral's consolidated.safetensors.
# Those that are in a folder already count as ever.
DUPLICATES = ("*/*", "consolidated*")


class ModelIdentity(NamedTuple):
    """What identifies a model: hashes of file contents, never names or paths."""

    weights: str
    tokenizer: str
    adapter: str | None
    architecture: str
    parameters_on_disk: int  # bytes of the weight files
    folder: str
    context_length: int | None  # tokens, where the configuration says so
    quantized: str | None = None  # how the linear layers are, by the checkpoint or the setting: nf4, fp4 or int8

    @property
    def fingerprint(self) -> str:
        """One hash of weights, tokenizer and starting adapter: 32 hex digits."""
        text = json.dumps([self.weights, self.tokenizer, self.adapter])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def context_length(config: Mapping[str, Any]) -> int | None:
    """The tokens that a model takes at most, by its config.json; None where that does not say."""
    return config.get("max_position_embeddings") or config.get("n_positions")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that decide what the tokens are."""
    files = matching(folder, TOKENIZER_FILES)
    if VOCABULARIES.isdisjoint(file.name for file in files):
        files = sorted({*files, *matching(folder, OTHER_VOCABULARIES)})
    return files


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of a folder that match any of the patterns, in order of their paths."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
