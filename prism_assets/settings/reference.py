"""docs/settings.md, from the schema: `python -m prism_assets.settings.reference > docs/settings.md`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prism_assets.settings.budget import Budget
from prism_assets.settings.method import TargetSettings
from prism_assets.settings.schema import Settings
from prism_assets.settings.section import Section

_HEAD = """# Settings

Every key of `prism.yaml`, made from the schema by `python -m prism_assets.settings.reference`. All have a default but
`targets`. Relative paths are relative to the file. `PRISM_SELECTION__BUDGET=10%` in the environment overrides
`selection.budget`. `prism init` writes a file with the most useful ones.
"""


def settings_page() -> str:
    """The page as Markdown: the keys at the top, then a table for each section, in the order of the schema."""
    top, sections = {}, {}
    for name, field in Settings.model_fields.items():
        section = _section_of(field)
        if section is None:
            top[name] = field
        else:
            sections[name] = section
    parts = [_HEAD, "## At the top\n", _table(top), "## `targets.<name>`\n", *_described(TargetSettings)]
    for name, section in sections.items():
        parts += [f"## `{name}`\n", *_described(section)]
    return "\n".join(parts)


def _section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _described(section: type[Section]) -> Iterator[str]:
    yield f"{section.__doc__}\n"
    yield _table(section.model_fields)


def _table(fields: Mapping[str, FieldInfo]) -> str:
    rows = [f"| `{name}` | {_default(field)} | {field.description} |" for name, field in fields.items()]
    return "\n".join(["| key | default | what it is |", "|---|---|---|", *rows, ""])


def _default(field: FieldInfo) -> str:
    """A default as it is written in YAML."""
    return "required" if field.is_required() else f"`{_yaml(field.get_default())}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value >= 100_000:
        return f"{value:_}"
    if isinstance(value, Budget | Path):
        return str(value)
    assert not isinstance(value, BaseModel), value
    return repr(value).replace("'", '"') if value == "\n" else str(value)


if __name__ == "__main__":
    print(settings_page(), end="")
