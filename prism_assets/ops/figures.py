"""What the work is about: rows and tokens of the pool, and the records of the targets.

Files that are ingested are known from the lake. Of the others a sample is tokenised, and their figures are extrapolated
from it by bytes.
"""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prism_assets.corpus.target_fit import TargetFit, target_fit
from prism_assets.errors import MixedTargets, SettingsError, UnreadableFile
from prism_assets.resources.lake import Artifact
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np

    from prism_assets.corpus.encoder import Encoder, TokenizedExample
    from prism_assets.corpus.inbox import InboxFile
    from prism_assets.corpus.limits import Limits
    from prism_assets.corpus.records import Kind, Message

MOST_RECORDS = 2_000  # tokenised of files that are not ingested
MOST_FILES = 64  # of these, or of ingested shards, that are looked into
_TWICE = 1.8  # a selection's JSON Lines beside its turns as JSON: they hold the same text as prompt and completion
_MOST_STORED = 512  # rows of ingested shards that are looked at


@dataclass
class Pool:
    """Rows and tokens of the candidates, files that are not ingested yet included."""

    files: int
    pending: list[str]  # shards that are not ingested
    rows: float = 0.0
    canonical_rows: float = 0.0  # rows that can be selected; all, while this is not known
    tokens: float = 0.0
    completion_tokens: float = 0.0
    pending_rows: float = 0.0
    pending_tokens: float = 0.0
    largest_shard: float = 0.0  # rows
    extrapolated: bool = False  # whether a part of these figures is
    sampled: int = 0  # records tokenised for it
    truncated: float = 0.0  # rows that lose a part of their prompt to max_length
    rejected: float = 0.0  # records
    bytes_a_row: float = 0.0  # of its table in the lake
    text_bytes: float = 0.0  # of a row's text as JSON Lines: prompt, completion and the turns once more
    tokenising: tuple[float, float] = (0.0, 0.0)  # seconds and CPU seconds a row
    # Stand for the pool, the longest of those looked at included.
    sample: "list[TokenizedExample]" = field(default_factory=list)

    @property
    def tokens_a_row(self) -> float:
        """Tokens, prompt and completion."""
        return self.tokens / self.rows if self.rows else 0.0


@dataclass
class TargetFile:
    """A target's file of target examples or of held-out records."""

    name: str  # of the target
    kind: "Kind"
    path: Path
    fit: TargetFit | None = None  # None where the file cannot be read
    problem: str = ""
    artifact: Artifact | None = None  # where the lake has today's rows
    examples: "list[TokenizedExample]" = field(default_factory=list)  # of pairs all wanted, then all unwanted ones
    size: int = 0  # records
    pairs: bool = False
    prompts: "list[np.ndarray]" = field(default_factory=list)  # those with an answer to be generated

    @property
    def tokens(self) -> int:
        """Of all examples; of pairs both completions count."""
        return sum(len(one.input_ids) for one in self.examples)

    @property
    def wanted_tokens(self) -> int:
        """Of the examples, of pairs the wanted ones."""
        return sum(len(one.input_ids) for one in self.examples[: self.size])


class Targets(NamedTuple):
    """The files of one target."""

    examples: TargetFile
    held_out: TargetFile


# -- the pool -----------------------------------------------------------------------------------------------------


def pool_figures(stage: Stage) -> Pool:
    """Rows and tokens of the inbox's files. Raises SettingsError where it has no file that can be read."""
    from prism_assets.corpus.candidates import inbox_files, inbox_limits, pending_candidates
    from prism_assets.corpus.encoding import encoder_of
    from prism_assets.corpus.files import READABLE

    inbox = stage.settings.candidates.inbox
    files = inbox_files(stage, at_rest_seconds=0) if inbox.is_dir() else {}
    if not files:
        raise SettingsError(f"candidates.inbox: {inbox} holds no file of records: {READABLE}")
    pool = Pool(len(files), pending_candidates(stage, sorted(files)))
    encoder = encoder_of(stage)
    waiting = set(pool.pending)
    _add_ingested(stage, pool, encoder, [key for key in sorted(files) if key not in waiting])
    columns = stage.settings.candidates.columns
    _add_pending(pool, encoder, [files[key] for key in pool.pending], inbox_limits(stage), columns)
    if not pool.sample:
        raise SettingsError(f"candidates.inbox: no record of the {len(files)} files in {inbox} can be used")
    pool.canonical_rows = _canonical_rows(stage, pool, sorted(files))
    return pool


def _canonical_rows(stage: Stage, pool: Pool, keys: Sequence[str]) -> float:
    found = stage.shown_or_none("live_pool")
    if found is None or stage.lake.read_table(found, ["shard"])["shard"].to_pylist() != keys:
        return pool.rows
    return found.notes["canonical_rows"]


def _add_ingested(stage: Stage, pool: Pool, encoder: "Encoder", keys: Sequence[str]) -> None:
    import numpy as np

    from prism_assets.corpus.records import messages_from_json
    from prism_assets.corpus.token_tables import from_table

    shards = {key: stage.shown("candidates", key) for key in keys}
    for shard in shards.values():
        pool.rows += shard.notes["rows"]
        pool.tokens += shard.notes["tokens"]
        pool.completion_tokens += shard.notes["completion_tokens"]
        pool.largest_shard = max(pool.largest_shard, shard.notes["rows"])
    looked_into = _evenly([shard for shard in shards.values() if shard.notes["rows"]], MOST_FILES)
    total = sum(shard.notes["rows"] for shard in looked_into)
    long = looked_at = text = 0
    for shard in looked_into:
        table = stage.lake.read_table(shard, ["messages", "input_ids", "loss_mask", "tokens"])
        wanted = max(1, round(_MOST_STORED * table.num_rows / total))
        rows = table.take(_evenly(range(table.num_rows), wanted))
        pool.sample += from_table(rows)
        longest = int(np.argmax(table["tokens"].to_numpy()))
        pool.sample += from_table(table.slice(longest, 1))
        looked_at += rows.num_rows
        text += sum(map(len, rows["messages"].to_pylist()))
        long += sum(_is_cut(encoder, messages_from_json(one)) for one in rows["messages"].to_pylist())
    pool.truncated += long / looked_at * pool.rows if looked_at else 0.0
    if looked_into:
        size = sum(stage.lake.store.size(shard.key) for shard in looked_into)
        pool.bytes_a_row, pool.text_bytes = size / total, _TWICE * text / looked_at


def _add_pending(
    pool: Pool,
    encoder: "Encoder",
    files: "Sequence[InboxFile]",
    limits: "Limits",
    columns: Mapping[str, str],
) -> None:
    """Tokenise a sample of files that are not ingested, and scale what it gave by their bytes."""
    import pyarrow.parquet as pq

    from prism_assets.corpus.encoder import TokenizedExample
    from prism_assets.corpus.sampling import sample_file
    from prism_assets.corpus.token_tables import encode_all, to_table

    looked_into = _evenly(files, MOST_FILES)
    size = sum(file.size for file in looked_into)
    scale = sum(file.size for file in files) / size if size else 1.0
    pool.extrapolated |= scale > 1
    table_bytes = text = found_rows = 0
    clock, processor = time.perf_counter(), time.process_time()
    for file in looked_into:
        try:
            found = sample_file(file.path, max(32, round(MOST_RECORDS * file.size / size)), limits, columns)
        except UnreadableFile:
            continue  # `candidates` reports it, with its reason
        pool.extrapolated |= found.share < 1
        tokenized, untokenizable = encode_all(found.examples, encoder)
        tokens = [one for one in tokenized if one is not None]
        pool.sampled += len(found.examples) + found.rejected
        weight = scale / found.share
        rows = len(tokens) * weight
        pool.pending_rows += rows
        pool.pending_tokens += weight * sum(len(one.input_ids) for one in tokens)
        pool.completion_tokens += weight * sum(int(one.loss_mask.sum()) for one in tokens)
        pool.rejected += weight * (found.rejected + len(untokenizable))
        pool.truncated += weight * sum(
            _is_cut(encoder, example.messages)
            for example, one in zip(found.examples, tokenized, strict=True)
            if one is not None and len(one.input_ids) * 2 > encoder.max_length
        )
        pool.largest_shard = max(pool.largest_shard, len(tokens) / found.share)
        pool.sample += [TokenizedExample(one.input_ids, one.loss_mask) for one in tokens]
        buffer = io.BytesIO()
        table = to_table(found.examples, tokenized)
        pq.write_table(table, buffer, compression="zstd")
        table_bytes += buffer.tell()
        text += sum(map(len, table["messages"].to_pylist()))
        found_rows += len(tokens)
    pool.rows += pool.pending_rows
    pool.tokens += pool.pending_tokens
    if found_rows:
        pool.bytes_a_row, pool.text_bytes = table_bytes / found_rows, _TWICE * text / found_rows
        took = time.perf_counter() - clock, time.process_time() - processor
        pool.tokenising = took[0] / found_rows, took[1] / found_rows


def _is_cut(encoder: "Encoder", messages: "Sequence[Message]") -> bool:
    return encoder.length(messages) > encoder.max_length


def _evenly(items: Sequence, count: int) -> list:
    """At most so many of them, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * one + 1) * len(items) // (2 * count)] for one in range(count)]


# -- targets ------------------------------------------------------------------------------------------------------


def target_figures(stage: Stage, names: Sequence[str]) -> Mapping[str, Targets]:
    """The records of each target's two files under today's tokenizer and settings."""
    return {name: Targets(_file(stage, name, "target"), _file(stage, name, "eval")) for name in names}


def _file(stage: Stage, name: str, kind: "Kind") -> TargetFile:
    from prism_assets.corpus.encoding import encoded_recipes, encoder_of, limits_of
    from prism_assets.corpus.files import read_examples
    from prism_assets.corpus.target_set import target_set
    from prism_assets.corpus.targets import may_be_mixed, target_file, too_few_records
    from prism_assets.corpus.token_tables import TARGET_SCHEMA, encode_all, prompt_tokens, to_table

    settings = stage.settings.targets[name]
    path = settings.examples if kind == "target" else settings.eval
    found = TargetFile(name, kind, path)
    if not path.is_file():
        found.problem = f"there is no file {path}"
        return found
    encoder = encoder_of(stage)
    try:
        mixed, limits = may_be_mixed(settings, kind), limits_of(stage)
        found.fit = target_fit(path, kind, encoder, mixed=mixed, limits=limits, columns=settings.columns)
        examples, _ = read_examples(path, kind, mixed=mixed, limits=limits, columns=settings.columns)
    except (UnreadableFile, MixedTargets) as error:
        found.problem = str(error)
        return found
    if not found.fit.used:
        found.problem = f"{path} holds no usable record: {found.fit.first}"
        return found
    if found.fit.too_few(settings.max_rejected):
        found.problem = too_few_records(stage, name, path, found.fit)
    tokenized, _ = encode_all(examples, encoder)
    table = to_table(examples, tokenized, TARGET_SCHEMA)
    records = target_set(table)
    found.examples, found.size, found.pairs = records.examples, records.size, records.pairs
    answers = table["answers"].to_pylist()
    if kind == "eval":
        found.prompts = [prompt_tokens(records.examples[row]) for row, one in enumerate(answers) if one]
    found.artifact = stage.lake.find(encoded_recipes(stage, target_file(stage, name, kind))[0])
    return found
