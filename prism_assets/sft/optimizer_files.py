"""Files of optimiser states as nested mappings: torch.save of one file, torch.distributed.checkpoint of a folder.

Nothing in them is run. torch reads a file with `weights_only`; the metadata of a distributed checkpoint, which torch
unpickles as they come, are read by an unpickler that knows the types of metadata alone.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import pickle
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from prism_assets.errors import UnreadableFile
from prism_assets.resources.model.optimizer_place import METADATA

_WANTED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "state1", "state2")


def read_nested(place: Path) -> Mapping[str, Any]:
    """`state` and `param_groups` as an optimiser's `state_dict()` has them, tensors on the CPU. Raises
    UnreadableFile."""
    found = _read_file(place) if place.is_file() else _read_folder(place)
    groups = found.get("param_groups") if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(found.get("state"), Mapping) or not isinstance(groups, list):
        raise UnreadableFile(place, "is no optimiser's state_dict(): it has no `state` and `param_groups`")
    if not groups or not all(isinstance(group, Mapping) and "params" in group for group in groups):
        raise UnreadableFile(place, "has no parameter groups, or one that does not name its `params`")
    return found


def _read_file(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken archive, or objects that are neither tensors nor plain values
        raise UnreadableFile(file, f"cannot be read as tensors and plain values: {_first_line(error)}") from error


def _read_folder(folder: Path) -> Mapping[str, Any]:
    """A distributed checkpoint, put together by the paths that its metadata have for their keys."""
    try:
        reader = _Reader(folder)
        metadata = reader.read_metadata()
        paths = {key: tuple(path) for key, path in (metadata.planner_data or {}).items()}
        wanted = {key: path for key, path in paths.items() if _is_wanted(path)}
        places = {path[: _start(path)] for path in wanted.values()}
        if len(places) > 1:
            names = " and ".join(sorted(".".join(map(str, place)) or "the top" for place in places))
            raise UnreadableFile(folder, f"holds several optimisers' states ({names}): save one of them by itself")
        kinds = metadata.state_dict_metadata
        values: dict[str, Any] = {
            key: torch.empty(kind.size, dtype=kind.properties.dtype)
            if isinstance(kind := kinds[key], TensorStorageMetadata)
            else None
            for key in wanted
        }
        planner = _Planner()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no process group is there
            load(values, storage_reader=_Reader(folder), planner=planner, no_dist=True)
        values |= planner.plain
    except UnreadableFile:
        raise
    except CheckpointException as error:  # which is no Exception
        cause, _ = next(iter(error.failures.values()))
        raise UnreadableFile(folder, f"cannot be read as a distributed checkpoint: {_first_line(cause)}") from error
    except Exception as error:  # whatever damaged metadata lead to
        raise UnreadableFile(folder, f"cannot be read as a distributed checkpoint: {_first_line(error)}") from error
    state: dict[Any, dict[str, Any]] = {}
    groups: dict[int, dict[str, Any]] = {}
    for key, path in wanted.items():
        kind, *rest = path[_start(path) :]
        into: Any = state if kind == "state" else groups
        into.setdefault(rest[0], {})[rest[1]] = values[key]
    return {"state": state, "param_groups": [groups[index] for index in sorted(groups)]}


def _start(path: tuple[Any, ...]) -> int:
    """Where `state` or `param_groups` stands in a path; its length where neither does."""
    return next((index for index, part in enumerate(path) if part in ("state", "param_groups")), len(path))


def _is_wanted(path: tuple[Any, ...]) -> bool:
    inner = path[_start(path) :]
    if len(inner) != 3:
        return False
    return inner[0] == "param_groups" or inner[2] in _WANTED


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


class _Reader(FileSystemReader):
    """Reads the metadata without running what they hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"its metadata are a {type(metadata).__name__}")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Makes torch's own records of metadata, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.serialization", "_get_layout"):
            return lambda _: torch.strided  # the one that tensors of an optimiser have
        if module.partition(".")[0] == "pathlib":
            return lambda *parts: "/".join(map(str, parts))  # where it was written; nobody asks
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"):
            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum)):
                return found
        raise pickle.UnpicklingError(f"its metadata hold {module}.{name}, which is none of torch's types of metadata")


class _Planner(DefaultLoadPlanner):
    """Takes what is no tensor as plain values, where torch would unpickle it."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: dict[str, Any] = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.plain[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)
