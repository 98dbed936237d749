"""The errors that users see, in one tree, each with the exit status that `prism` ends with.

Exit status 2: the user must change something (settings, files, a name). 1: the work failed. What is raised to steer a
loop (a bad record, an example that cannot be tokenised) is no error of the user's and is defined where it is raised.
"""

from importlib.metadata import version
from pathlib import Path

from prism_assets.text import visible


class PrismError(Exception):
    """Something that was asked for could not be done; the message says what, where and what to do."""

    exit_status = 1

    def __str__(self) -> str:
        """The message, which may quote data: nothing in it acts on the terminal or log that it is shown in."""
        return visible(super().__str__())


# -- what the user must change ------------------------------------------------------------------------------------


class UserMistake(PrismError):
    """The user must change something: settings, a file, a name on the command line."""

    exit_status = 2


class SettingsError(UserMistake):
    """`prism.yaml` (or an environment variable) must be changed; the message says where and how."""


class UnsuitableSetting(SettingsError, ValueError):
    """A setting that does not go with the data, the model or another setting; the message names it."""


class TooLittleMemory(SettingsError, MemoryError):
    """A setting asks for more memory than the device has; the message says which to lower."""


class TrainingDiverged(SettingsError, FloatingPointError):
    """A loss or a weight became infinite or no number; the message says after which step, and what to lower."""


class NoSuchDevice(SettingsError, RuntimeError):
    """The settings ask for a device that is not there."""


class ModelError(UserMistake):
    """The model cannot be used as asked; the message says why and what to change in `model:`."""


class UnsupportedModelError(UserMistake, ValueError):
    """The model or its adapter has a part that the gradient engine does not support; the message names it.

    `module` is the name of the adapted layer that is refused, where it is a single one.
    """

    def __init__(self, message: str, module: str | None = None):
        super().__init__(message)
        self.module = module


class UnusableTokenizer(UserMistake, ValueError):
    """A tokenizer or chat template that cannot write training examples; the message gives advice."""


class UnreadableFile(UserMistake, ValueError):
    """A file that cannot be read at all; the message names it, says why, and what to do."""

    def __init__(self, path: Path | str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


class MixedTargets(UserMistake, ValueError):
    """A target or held-out file of plain records and pairs; ``plain_line`` and ``pair_line`` are the first."""

    def __init__(self, path: Path | str, plain_line: int, pair_line: int):
        super().__init__(
            f"{path}: line {plain_line} is a plain record and line {pair_line} a pair (it has an unwanted "
            "completion); a file holds plain records or pairs, not both: split it into two targets, or, for target "
            "examples, let targets.<name>.anchors (choices, generated, shuffled) give the plain ones an unwanted one"
        )
        self.path, self.plain_line, self.pair_line = Path(path), plain_line, pair_line


class UnusableTargets(UserMistake):
    """A target or held-out file is missing or has no usable row; the message says which and why."""


class UnusableBenchmark(UserMistake):
    """An entry of `evaluation.benchmarks` cannot be run; the message names it and what to do."""


class CannotExplain(UserMistake):
    """The candidate is unknown, ambiguous or has no score; the message says why."""


class CannotExport(UserMistake):
    """There is nothing to export, or no place for it; the message says what to do."""


class QueryRefused(UserMistake):
    """The SQL does more than read, or DuckDB does not understand it; the message says which."""


class UnknownThing(UserMistake):
    """Nothing in the lake, or more than one thing, matches the name that was given; the message lists similar names."""


# -- what failed --------------------------------------------------------------------------------------------------


class LakeError(PrismError):
    """The lake cannot do what was asked; the message says why and what to do."""


class NotMadeYet(LakeError):
    """Nothing was made yet of what was asked for; the message names what to run."""

    exit_status = 2


class DamagedArtifact(LakeError):
    """A published file cannot be read as what it claims to be (truncated, overwritten)."""


class DamagedSegment(PrismError, RuntimeError):
    """An index segment that cannot be read: truncated, of another kind, or no FAISS file at all."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = Path(path), reason
        super().__init__(
            f"{path}: {reason}. Delete this segment and materialise the index again: it is rebuilt from the feature "
            "rows"
        )


class StageError(PrismError):
    """A stage cannot do its work with what there is: no candidate, no usable target, a part that went missing."""


class ShardGone(StageError):
    """The file of a shard was edited, renamed or removed after it was listed: the next look at the inbox takes what is
    there then."""


class PipelineError(PrismError):
    """A Dagster run failed; the message carries the step's own reason."""


class RunRefused(UserMistake, PipelineError):
    """A run cannot begin, or failed, for a reason that the user must change something about."""


class LibraryChanged(PrismError):
    """A library no longer has a private name that is relied on; the message names both and says what to do."""

    def __init__(self, library: str, name: str) -> None:
        super().__init__(
            f"{library} {version(library)} no longer has {name} as it was, which prism-assets relies on: install the "
            f"release of {library} that constraints.txt names, or change prism_assets/compat.py."
        )


def error_named(name: str | None) -> type[PrismError] | None:
    """The class of this tree with that name: of a step's error Dagster keeps no more than text. None for others."""
    found = globals().get(name or "")
    return found if isinstance(found, type) and issubclass(found, PrismError) else None
