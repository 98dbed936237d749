"""DAGSTER_HOME: which instance a project works on, and the rule of one lake for each project name."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from prism_assets.engines import open_lake
from prism_assets.errors import UserMistake
from prism_assets.resources.private_folders import make_private
from prism_assets.settings import Settings

if TYPE_CHECKING:
    import dagster as dg

# Names, in a DAGSTER_HOME outside of the lake, the lake of a project: this file for the project without a prefix, one
# with a dash and the project's name for another.
_OWNER_FILE = "prism-lake"
_OPENING = ".prism-opening"


def package_file(name: str) -> Path:
    """A file that comes with the package: workspace.yaml, dagster.yaml, example.yaml."""
    return Path(__file__).resolve().parent.parent / name


def dagster_home(settings: Settings) -> Path:
    """DAGSTER_HOME where it is set, else a folder in the lake; made, with our dagster.yaml, when missing.

    Raises UserMistake where the one that is set serves this project for another lake.
    """
    given = os.environ.get("DAGSTER_HOME")
    lake = open_lake(settings)
    home = Path(given) if given else lake.home_of("dagster")
    if not given:
        make_private(lake.folder)
    make_private(home)
    claim_home(home, lake.folder)
    instance_file = home / "dagster.yaml"
    if not instance_file.exists():
        shutil.copyfile(package_file("dagster.yaml"), instance_file)
    return home


def claim_home(home: Path, root: Path, project: str = "") -> None:
    """Tie a project of a Dagster instance to the lake at `root`. Raises UserMistake where it is tied to another lake.

    In an instance a project has one set of shards: of two lakes under one name, each would retire the shards of the
    other. A home inside of the lake moves with the lake and needs no mark.
    """
    home, root = home.resolve(), root.resolve()
    if home.is_relative_to(root):
        return
    mark = home / (f"{_OWNER_FILE}-{quote(project, safe='')}" if project else _OWNER_FILE)
    try:
        with open(mark, "x", encoding="utf-8") as file:
            file.write(str(root))
    except FileExistsError:
        owner = mark.read_text(encoding="utf-8").strip()
        if owner and Path(owner) != root:
            named = f"the project {project!r}" if project else "this project"
            raise UserMistake(
                f"DAGSTER_HOME {home} serves the lake {owner}, and the lake of {named} is {root}: on one Dagster "
                "instance two projects of one name would retire each other's shards. Set another DAGSTER_HOME, or "
                "none, or give one of them a key_prefix (build_definitions). If the lake was moved, "
                f"delete {mark}."
            ) from None


@contextmanager
def instance_of(settings: Settings) -> "Iterator[dg.DagsterInstance]":
    """The Dagster instance of these settings, which leaves stdout and stderr of the steps to the terminal.

    Dagster would redirect both to files for the UI, and print them by processes of its own: no progress on the
    terminal, and tracebacks of these processes at Ctrl-C.
    """
    from filelock import FileLock

    from prism_assets.compat import instance_without_captured_output

    home = dagster_home(settings)
    with ExitStack() as stack:
        # One process at a time: two that make the database of a new instance leave it with two versions, and no process
        # opens it again.
        with FileLock(home / _OPENING):
            instance = stack.enter_context(instance_without_captured_output(home))
        yield instance
