"""docs/reference/commands.md, from the command line itself."""

import sys
from typing import Any

from prism_assets.pages.markdown import codes, page, prose, table

_HEAD = """# Commands

Every command of `prism`, made from the code by `python -m prism_assets.pages`. `prism COMMAND --help` prints the same.

Exit status: 0 done, 1 the work failed, 2 you must change something. The settings are those of `--config`, else of the
file that the variable `PRISM_CONFIG` names, else of `./prism.yaml`. Beside the commands there are `prism --version` and
`prism --install-completion` (of the shell that you are in).
"""


def commands_page() -> str:
    """The page as Markdown, a section for each command in the order of `prism --help`."""
    import typer

    from prism_assets.cli import app

    group: Any = typer.main.get_command(app)
    parts = [_HEAD]
    parts.append(table(["command", "what it does"], [[_link(name), _first(one.help)] for name, one in _of(group)]))
    for name, command in _of(group):
        parts += [f"## `prism {name}`", prose(command.help), _usage(name, command), _parameters(command)]
    return page(*parts)


def _of(group: Any) -> list[tuple[str, Any]]:
    return [(name, one) for name, one in group.commands.items() if not one.hidden]


def _link(name: str) -> str:
    return f"[`prism {name}`](#prism-{name})"


def _first(text: str) -> str:
    return prose(text).split(". ")[0].rstrip(".") + "."


def _usage(name: str, command: Any) -> str:
    arguments = [
        one.name.upper() if one.required else f"[{one.name.upper()}]" for one in _shown(command) if not _is_option(one)
    ]
    required = [f"{one.opts[0]} {_kind(one)}" for one in _shown(command) if _is_option(one) and one.required]
    return f"```\nprism {' '.join([name, *arguments, *required, '[OPTIONS]'])}\n```"


def _parameters(command: Any) -> str:
    rows = [[_name(one), _default(one), prose(one.help)] for one in _shown(command)]
    return table(["argument or option", "default", "what it is"], rows)


def _shown(command: Any) -> list[Any]:
    return [one for one in command.params if not getattr(one, "hidden", False)]


def _is_option(parameter: Any) -> bool:
    return parameter.param_type_name == "option"


def _name(parameter: Any) -> str:
    if not _is_option(parameter):
        return f"`{parameter.name.upper()}`"
    kind = "" if parameter.is_flag else f" {_kind(parameter)}"
    return codes([*(f"{one}{kind}" for one in parameter.opts), *parameter.secondary_opts])


def _kind(parameter: Any) -> str:
    return parameter.name.upper().removeprefix("AS_")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False or getattr(parameter, "is_flag", False):
        return "–"
    return f"`{parameter.default}`"


if __name__ == "__main__":
    sys.stdout.write(commands_page())  # of the code, none of it data
