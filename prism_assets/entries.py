"""What an entry of the registry (`prism_assets/tables.py`) says of a table and of an asset. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

# What the heads of a table are kept under, so that results of different settings lie side by side (`identity`).
Scope = Literal["none", "corpus", "warmup", "features"]
Partitions = Literal["shard", "target", "target_strategy"] | None
# How automation makes an asset (`ops.conditions`); None: started manually only.
Condition = Literal["when_missing", "follow", "follow_arrivals", "follow_selections", "follow_evaluations"] | None
Command = Literal["run", "select", "trust", "experiment"]


@dataclass(frozen=True)
class Table:
    """A kind of artefact."""

    name: str
    # Raised by hand when the same inputs and settings get other results, beyond rounding.
    version: int
    scope: Scope = "none"
    # Column -> SQL type: there also while the table, or a column of it, has no data. None: the catalogue shows what is
    # there.
    columns: Mapping[str, str] | None = None
    # Column -> table: these columns hold fingerprints of other artefacts.
    rows_name: Mapping[str, str] = field(default_factory=dict)
    # Its partitions are shards: what shows a retired one may go.
    by_shard: bool = False
    # Its rows list the shards of one state of the pool.
    lists_shards: bool = False
    # Its heads follow the artefacts that they show, wherever these are needed.
    heads_follow: bool = False
    # Of an older feature version that stays, the last artefact of each partition stays, shown or not.
    last_stays: bool = False
    # Its artefacts are parts of those of this table: while a live shard has none of these under the current version,
    # all parts of that version stay.
    parts_of: str | None = None
    # Named one by one on the cards of an export.
    on_cards: bool = False

    def schema(self) -> "pa.Schema":
        """The columns as Arrow types, in their order: what the table is published with.

        Raises KeyError for an SQL type without an Arrow type of its own, ValueError where the entry names no columns.
        """
        import pyarrow as pa

        if self.columns is None:
            raise ValueError(f"the registry (prism_assets/tables.py) names no columns of the table {self.name!r}")
        types = {"VARCHAR": pa.string(), "BIGINT": pa.int64(), "INTEGER": pa.int32(), "BOOLEAN": pa.bool_()}
        types |= {"DOUBLE": pa.float64(), "FLOAT": pa.float32()}
        types |= {f"{name}[]": pa.list_(kind) for name, kind in types.items()}
        return pa.schema([(name, types[kind]) for name, kind in self.columns.items()])


class Needs(NamedTuple):
    """What an asset cannot start without, though other inputs may be missing or in progress."""

    asset: str | None = None  # some partition of this input; None: all inputs
    asked_for: bool = False  # one that is being asked for at the same moment counts


@dataclass(frozen=True)
class Asset:
    """An asset: the module that builds it and all that is said of it elsewhere."""

    name: str
    module: str  # has `build(project) -> AssetsDefinition`
    tables: tuple[Table, ...]
    partitions: Partitions = None
    condition: Condition = None
    # It costs a fine-tuning: by automation only where `train: on_arrival` says so.
    fine_tunes: bool = False
    # Of an asset that follows arrivals, which inputs in progress do not hold back.
    needs: Needs | None = None
    # Sections of prism.yaml that it reads. They are part of its code version, so the UI shows an asset whose settings
    # changed as stale, and automation makes it again.
    reads: tuple[str, ...] = ()
    job: str | None = None  # of `JOBS`
    step: str | None = None  # of the commands; assets of one step are made in one run. None: of no command
    commands: tuple[Command, ...] = ("run",)  # `prism run`, …: those that have the step
    # A function of its module, `(stage, shards) -> those that the lake has not finished`.
    pending: str | None = None
    # A command that is asked for some targets makes it of all.
    of_all_targets: bool = False

    @property
    def table(self) -> Table:
        """The first table: what the asset is named for."""
        return self.tables[0]
