"""Reading `prism.yaml`: environment variables override it, errors that name file, key and what to do, absolute paths.

`PRISM_SELECTION__BUDGET=10%` sets `selection.budget`. Relative paths are relative to the file that names them.
`PRISM_CONFIG` names the file where no other is given.

The variables are laid over the file by hand, not by pydantic-settings: that silently leaves out a section that is null
in one of its sources, and its errors name the key and not the variable that the value came from.
"""

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from prism_assets.errors import SettingsError
from prism_assets.settings.method import TargetSettings
from prism_assets.settings.schema import Settings, StorageSettings
from prism_assets.settings.section import Section

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

DEFAULT_FILE = "prism.yaml"


# Variables of ours that override nothing.
_NO_SETTINGS = {"PRISM_CONFIG", "PRISM_REAL_DATA"}


def config_path(given: str | os.PathLike | None = None) -> Path:
    """The file to read: the one given, else `PRISM_CONFIG`, else `prism.yaml` here."""
    return Path(given or os.environ.get("PRISM_CONFIG") or DEFAULT_FILE).expanduser().resolve()


def load_settings(given: str | os.PathLike | None = None) -> Settings:
    """Read, override from the environment, validate, and make paths absolute.

    Raises SettingsError that names the file, the key and what to do.
    """
    path = config_path(given)
    if not path.is_file():
        raise SettingsError(
            f"There is no {path}. `prism init` writes a commented one; --config or PRISM_CONFIG name another."
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    except RecursionError:
        raise SettingsError(f"{path} is nested too deeply: no setting lies deeper than four levels.") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    if not isinstance(content, dict):
        raise SettingsError(
            f"{path} must hold keys and values at its top, such as `targets:`; it holds {type(content).__name__}."
        )
    return from_mapping(content, path)


class _StrictLoader(yaml.SafeLoader):
    """YAML's plain types; a key that is given twice is an error, where PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def from_mapping(content: dict[str, Any], path: Path) -> Settings:
    """Settings from the content of the file at `path`. Raises SettingsError."""
    try:
        settings = Settings(**_overridden(content))
    except ValidationError as error:
        raise SettingsError("\n".join([f"{path} needs a change:", *map(_explain, error.errors())])) from error
    except TypeError as error:  # a key that is no string
        raise SettingsError(f"{path}: every key at the top must be a word ({error}).") from error
    settings = _absolute(settings, path.parent)
    _require_folders(settings, path)
    return settings


def _require_folders(settings: Settings, path: Path) -> None:
    """Raise SettingsError where there is a file and a folder is expected."""
    folders = {
        "candidates.inbox": settings.candidates.inbox,
        "storage.root": settings.storage.root,
        "storage.report": settings.storage.report,
        "storage.out": settings.storage.out,
    }
    for key, folder in folders.items():
        there = next(one for one in (folder, *folder.parents) if one.exists())
        if not there.is_dir():
            raise SettingsError(
                f"{path} needs a change:\n  {key}: {there} is a file; name a folder, there or to be made."
            )


def _overridden(content: dict[str, Any]) -> dict[str, Any]:
    """The content with `PRISM_<KEY>__<KEY>…` from the environment overriding it; values are read as YAML."""
    for name, text in sorted(os.environ.items()):
        keys = name.removeprefix("PRISM_").lower().split("__")
        if not name.startswith("PRISM_") or name in _NO_SETTINGS:
            continue
        section = Settings.model_fields.get(keys[0])
        known = getattr(section.annotation, "model_fields", None) if section and len(keys) > 1 else None
        if section is None or (known is not None and keys[1] not in known):
            raise SettingsError(
                f"The environment variable {name} names no key of prism.yaml; {_nearest_variable(name)}"
            )
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"The environment variable {name} is not YAML: {error}") from error
        for key in reversed(keys):
            value = {key: value}
        content = _merge(content, value)
    return content


def _nearest_variable(name: str) -> str:
    """Advice on a variable whose name fits no key: the nearest one that does."""
    known = [f"PRISM_{section}".upper() for section in Settings.model_fields]
    for section, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            known += [f"PRISM_{section}__{key}".upper() for key in field.annotation.model_fields]
    by_flat = {one.replace("__", "_"): one for one in known} | {
        f"PRISM_{one.split('__')[-1]}": one for one in known if "__" in one
    }
    near = difflib.get_close_matches(name.upper().replace("__", "_"), by_flat, n=1, cutoff=0.6)
    return f"did you mean {by_flat[near[0]]}?" if near else "a key of a section is written PRISM_SECTION__KEY."


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _merge(below.get(key), value) for key, value in above.items()}
    return above


def _absolute(settings: Settings, folder: Path) -> Settings:
    def at(path: Path) -> Path:
        return (folder / path.expanduser()).resolve()

    def local(name: str | None) -> str | None:
        """A model folder is written like a path (./x, ../x, /x, ~/x) or exists; everything else is a hub name."""
        if name and (name.startswith((".", "/", "~")) or (folder / name).is_dir()):
            return str(at(Path(name)))
        return name

    state = settings.warmup.optimizer_state
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(
                update={"name": local(settings.model.name), "adapter": local(settings.model.adapter)}
            ),
            "warmup": settings.warmup.model_copy(update={"optimizer_state": state and at(state)}),
            "candidates": settings.candidates.model_copy(update={"inbox": at(settings.candidates.inbox)}),
            "targets": {
                name: target.model_copy(update={"examples": at(target.examples), "eval": at(target.eval)})
                for name, target in settings.targets.items()
            },
            "evaluation": settings.evaluation.model_copy(
                update={
                    "benchmarks": tuple(
                        str(at(Path(one))) if one.endswith((".yaml", ".yml")) else one
                        for one in settings.evaluation.benchmarks
                    )
                }
            ),
            "storage": StorageSettings(**{name: at(path) for name, path in settings.storage}),
        }
    )


def _explain(error: "ErrorDetails") -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _keys_beside(error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        advice = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}."
        return f"  {place}: unknown key; {advice}"
    if error["type"] == "missing":
        return f"  {place}: is missing."
    given = repr(error.get("input"))
    shown = "" if isinstance(error.get("input"), dict) else f" (given: {given[:80]})"
    return f"  {place or 'top'}: {error['msg'].removeprefix('Value error, ')}{shown}."


def _keys_beside(location: tuple[Any, ...]) -> list[str]:
    """The known keys at the level of the last part of a location."""
    level: Any = Settings
    for part in location[:-1]:
        if level is Settings and part == "targets":
            level = "names"
        elif level == "names":
            level = TargetSettings
        else:
            level = level.model_fields[part].annotation
    return sorted(level.model_fields)
