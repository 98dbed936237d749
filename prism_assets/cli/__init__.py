"""`prism`: the command line over the same definitions that Dagster loads. One module a command.

Exit status: 0 done, 1 the work failed, 2 the user must change something (`errors` says which is which). Heavy imports
live inside the commands: `prism --help` needs neither dagster nor torch.
"""

from importlib import import_module

from prism_assets.cli.common import app

# In the order of `prism --help`.
_COMMANDS = (
    "init estimate select run report experiment demo trust query ui doctor explain export lineage sql gc".split()
)
for _command in _COMMANDS:
    import_module(f"prism_assets.cli.{_command}")


def main() -> None:
    """The console script. Every expected failure leaves one clear message and an exit status."""
    app()


__all__ = ["app", "main"]
