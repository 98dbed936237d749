"""What every mapping of `prism.yaml` is."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

# The fields of records that a column of a file may be named as. A mapping with such keys is one of text to readers of
# files, which the types of dict do not allow.
if TYPE_CHECKING:
    ColumnName = str
else:
    ColumnName = Literal[
        "prompt",
        "completion",
        "messages",
        "conversations",
        "instruction",
        "output",
        "input",
        "context",
        "system",
        "history",
        "tools",
        "chosen",
        "rejected",
        "safe",
        "unsafe",
        "label",
        "id",
        "source",
        "group",
        "answer",
        "answers",
        "choices",
    ]


class Section(BaseModel):
    """A mapping of `prism.yaml`. The descriptions of its fields are shown in docs/settings.md."""

    # Defaults are validated too, so that a default of 32 and a given 32 are the same float in a fingerprint.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
