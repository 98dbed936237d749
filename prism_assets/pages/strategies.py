"""docs/reference/strategies.md, from the registry of strategies."""

import inspect
import sys
from collections.abc import Iterator

from prism_assets.pages.markdown import codes, page, prose, table
from prism_assets.selection.strategies import STRATEGIES, Strategy
from prism_assets.settings import Settings

_HEAD = """# Strategies, from the registry

Made from the code by `python -m prism_assets.pages`. [Strategies](../strategies.md) compares them, says what each input
costs, and adds one as an example.

**One direction**: rows are ranked by the inner product of their gradient features with one vector, a weighted sum of
the targets' gradients. `prism query` and `prism explain` work with these. **Own order**: the strategy orders rows
itself.
"""


def strategies_page() -> str:
    """The page as Markdown: a table of all strategies, then each with what its docstrings say of the formula."""
    default = Settings.model_fields["strategies"].get_default()
    rows = [
        [
            f"[`{one.name}`](#{one.name})",
            "yes" if one.name in default else "no",
            "one direction" if one.needs_direction else "own order",
            codes(_reads(one)),
            "those with a usable gradient" if one.needs_features else "all",
        ]
        for one in STRATEGIES.values()
    ]
    columns = ["strategy", "by default", "ranks by", "reads", "rows that can be ranked"]
    parts = [_HEAD, table(columns, rows)]
    for one in STRATEGIES.values():
        parts += [f"## `{one.name}`", one.description[0].upper() + one.description[1:] + ".", *_details(one)]
    return page(*parts)


def _reads(strategy: Strategy) -> list[str]:
    return sorted(strategy.reads | ({"direction"} if strategy.needs_direction else set()))


def _details(strategy: Strategy) -> Iterator[str]:
    if strategy.whole_pool:
        yield "Takes everything, whatever the budget."
    if strategy.by_label:
        yield "Removes the rows that `targets.<name>.label` calls harmful, whatever the budget."
    function = strategy.weigh or strategy.rank
    assert function is not None, strategy.name
    if function.__doc__:
        yield prose(function.__doc__)
    module = inspect.getmodule(function)
    assert module is not None, strategy.name
    yield f"Source: `{module.__name__.replace('.', '/')}.py`, {codes([function.__name__])}."


if __name__ == "__main__":
    sys.stdout.write(strategies_page())  # of the code, none of it data
