"""What an artefact is and what it is made from. A recipe's fingerprint is known before the work is done."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from prism_assets.resources.lake.spool import Spool

FINGERPRINT_LENGTH = 32
FINGERPRINT = re.compile(rf"[0-9a-f]{{{FINGERPRINT_LENGTH}}}\Z")
SIDECAR = "artifact.json"  # in a folder artefact: its header


def digest(value: Any) -> str:
    """A hash of a JSON-like value that depends on nothing but the value: 32 hex digits of SHA-256."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:FINGERPRINT_LENGTH]


@dataclass(frozen=True)
class Artifact:
    """Something published: a Parquet table, a safetensors file or a folder, with the header that describes it."""

    table: str
    fingerprint: str
    content_hash: str
    key: str  # its name in the store; `Lake.local` says where it can be read
    header: Mapping[str, Any]

    @property
    def partition(self) -> str | None:
        """The partition that it was made for; None for an asset without partitions."""
        return self.header.get("partition")

    @property
    def notes(self) -> Mapping[str, Any]:
        """What the maker recorded beside the content: counts, seconds, diagnostics."""
        return self.header.get("notes", {})


@dataclass(frozen=True)
class Recipe:
    """What an artefact is made from. Its fingerprint is known before the work is done.

    `inputs` and `settings` make the identity: inputs count by content hash, never by name or path, so an input
    that was recomputed to the same content changes nothing downstream. `lineage` names further artefacts that the
    work looked at but that do not define it (the pool that a pinned sample was drawn from).
    """

    table: str
    stage_version: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, "Artifact | Sequence[Artifact] | str"] = field(default_factory=dict)
    lineage: Mapping[str, "Artifact | Sequence[Artifact] | str"] = field(default_factory=dict)
    partition: str | None = None
    version: str | None = None

    @property
    def fingerprint(self) -> str:
        """The hash of table, stage version, settings and content of the inputs: 32 hex digits."""
        return digest(
            {
                "table": self.table,
                "stage_version": self.stage_version,
                "settings": dict(self.settings),
                "inputs": {role: _content_of(value) for role, value in self.inputs.items()},
            }
        )


# What can be published.


@dataclass(frozen=True)
class Rows:
    """A table, to be published as Parquet.

    `attachments` maps a file suffix (".jsonl") to a function that writes such a file beside it.
    """

    table: "pa.Table | Spool"
    notes: Mapping[str, Any] = field(default_factory=dict)
    attachments: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)
    compression: str = "zstd"


@dataclass(frozen=True)
class Tensors:
    """Named tensors, to be published as one safetensors file."""

    tensors: "Mapping[str, torch.Tensor]"
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Folder:
    """A folder that `write(folder)` fills; what it returns is added to the notes."""

    write: Callable[[Path], Mapping[str, Any] | None]
    notes: Mapping[str, Any] = field(default_factory=dict)


Content = Rows | Tensors | Folder


class Reference(NamedTuple):
    """An input as the header of an artefact names it. Plain hashes (a file, a model) have no table and fingerprint."""

    role: str
    table: str | None
    fingerprint: str | None
    content_hash: str | None
    defines: bool  # whether it is part of the artefact's identity


def references(artifact: Artifact) -> Iterator[Reference]:
    """Everything that the header of an artefact names as what it was made from."""
    for defines, key in ((True, "inputs"), (False, "lineage")):
        for role, value in artifact.header.get(key, {}).items():
            for one in value if isinstance(value, list) else [value]:
                yield Reference(role, one.get("table"), one.get("fingerprint"), one.get("content_hash"), defines)


def _content_of(value: "Artifact | Sequence[Artifact] | str") -> Any:
    if isinstance(value, Artifact):
        return value.content_hash
    return value if isinstance(value, str) else [_content_of(one) for one in value]
