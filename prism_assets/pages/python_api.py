"""docs/reference/python.md, from what `prism_assets` exports."""

import inspect
import sys
from importlib import import_module
from typing import Any

import prism_assets
from prism_assets.pages.markdown import page, prose

_HEAD = """# Python

What may be imported from outside, made from the code by `python -m prism_assets.pages`. Everything else may change
without notice; what changed is in [CHANGELOG.md](../../CHANGELOG.md). Names are imported from `prism_assets` but for
those with a module of their own.
"""
# Beside what the package exports: what the documentation tells people to call.
_MORE = {"prism_assets.tables": ("register",), "prism_assets.stage": ("Stage",)}
_METHODS = {"Stage": ("shown", "recipe", "make", "show", "adapted", "with_settings")}


def python_page() -> str:
    """The page as Markdown: signature and docstring of each name."""
    parts = [_HEAD]
    for name in prism_assets.__all__:
        parts += _described(name, getattr(prism_assets, name))
    for module, names in _MORE.items():
        for name in names:
            parts += _described(f"{module}.{name}", getattr(import_module(module), name))
    return page(*parts)


def _described(name: str, thing: Any) -> list[str]:
    short = name.rpartition(".")[2]
    if not inspect.isclass(thing):
        return [f"## `{name}`", _signature(short, thing), prose(inspect.getdoc(thing))]
    parts = [f"## `{name}`", prose(inspect.getdoc(thing))]
    for method in _METHODS.get(short, ()):
        one = getattr(thing, method)
        parts += [_signature(f"{short.lower()}.{method}", one), prose(inspect.getdoc(one))]
    return parts


def _signature(name: str, function: Any) -> str:
    parameters = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    shown = []
    for one in parameters:
        plain = one.replace(annotation=inspect.Parameter.empty)
        # The name of an object, not where it is in memory.
        given = f"{one.name}={one.default.name}" if hasattr(one.default, "name") else str(plain)
        if one.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(given)
    return f"```python\n{name}({', '.join(shown)})\n```"


if __name__ == "__main__":
    sys.stdout.write(python_page())  # of the code, none of it data
