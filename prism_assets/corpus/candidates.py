"""The asset `candidates`: every inbox file as rows, validated, de-duplicated and tokenised once."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import dagster as dg

from prism_assets.corpus.encoding import READING, encode_file, limits_of, limits_of_recipe
from prism_assets.corpus.record_file import WHOLE_FILE, RecordFile
from prism_assets.errors import ShardGone
from prism_assets.metadata import preview
from prism_assets.project import Check, Project
from prism_assets.stage import Stage
from prism_assets.text import visible
from prism_assets.work import Outcome, each_partition, stage_of

if TYPE_CHECKING:
    from prism_assets.corpus.inbox import InboxFile, Scan
    from prism_assets.corpus.limits import Limits

FILE_READABLE = Check("file_readable", "The inbox file can be read at all.", dg.AssetCheckSeverity.ERROR)
ROWS_ACCEPTED = Check("rows_accepted", "No row of the file was rejected.")
PROMPTS_WHOLE = Check("prompts_whole", "No row lost a part of its prompt, and no text its end, to max_length.")
TABLES = ("candidates", "rejects", "candidate_fields")
_SHOWN = 8  # rows and rejects in the metadata


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "candidates",
        group="corpus",
        kinds={"parquet"},
        deps=["base_model"],
        checks=[FILE_READABLE, ROWS_ACCEPTED, PROMPTS_WHOLE],
    )
    def candidates(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Candidate examples of one inbox file, validated, de-duplicated within the file and tokenised once.

        A record that is not accepted is in the table `rejects` with line, field and reason. What a row's record holds
        beside its conversation is in the table `candidate_fields`. A file that cannot be read at all yields no rows and
        fails the check `file_readable`; other files go on.
        """
        stage = stage_of(project, context)
        files = inbox_files(stage, at_rest_seconds=0)
        return each_partition(context, stage, lambda shard: _ingest_if_there(stage, files, shard))

    return candidates


def inbox_files(stage: Stage, at_rest_seconds: float | None = None) -> "Mapping[str, InboxFile]":
    """The files of the inbox by shard key."""
    return {file.key: file for file in scan_inbox(stage, at_rest_seconds).files}


def scan_inbox(stage: Stage, at_rest_seconds: float | None = None) -> "Scan":
    """The files of the inbox, with content hashes remembered in the lake; settled after `at_rest_seconds` (default: the
    setting)."""
    from prism_assets.corpus.inbox import scan

    settings = stage.settings.candidates
    rest = settings.at_rest_seconds if at_rest_seconds is None else at_rest_seconds
    return scan(settings.inbox, stage.lake.cache_file("inbox.json"), rest, settings.follow_links)


def inbox_limits(stage: Stage) -> "Limits":
    """What may be read of a file of the inbox."""
    settings = stage.settings.candidates
    return limits_of(stage, None if settings.follow_links else settings.inbox)


def pending_candidates(stage: Stage, keys: Sequence[str]) -> list[str]:
    """The shards among `keys` that are not ingested under today's tokenizer and settings, whose rows got damaged, or of
    which a limit that has been changed kept something out."""
    return [key for key in keys if _is_pending(stage, key)]


def _is_pending(stage: Stage, key: str) -> bool:
    rows, rejects, fields = (stage.shown_or_none(table, key) for table in TABLES)
    if rows is None or rejects is None or fields is None:
        return True
    if fields.header["settings"].get("reading") != READING:
        return True  # rows that an earlier reading gave are compared with today's
    if rejects.header["settings"].get("columns", {}) != stage.settings.candidates.columns:
        return True
    if rejects.header["settings"].get("limits") == limits_of_recipe(stage).get("limits"):
        return False
    return any("limits." in reason for reason in stage.lake.read_table(rejects, ["reason"])["reason"].to_pylist())


def _ingest_if_there(stage: Stage, files: "Mapping[str, InboxFile]", shard: str) -> Outcome:
    """The rows of a shard's file. One that went after it was listed fails no run: the next look at the inbox retires
    the shard."""
    try:
        return _ingest(stage, files, shard)
    except ShardGone as gone:
        stage.log.warning(visible(str(gone)))
        return Outcome([], 0, {"gone": str(gone)}, [FILE_READABLE(False, reason=str(gone))])


def _ingest(stage: Stage, files: "Mapping[str, InboxFile]", shard: str) -> Outcome:
    from prism_assets.corpus.files import iter_examples
    from prism_assets.corpus.token_tables import CANDIDATE_SCHEMA

    if shard not in files:
        known = stage.shown_or_none("candidates", shard)
        if known is None:
            raise ShardGone(
                f"Shard {shard} is no longer in the inbox {stage.settings.candidates.inbox}: its file was edited, "
                "renamed or removed before it could be read. The next look at the inbox retires the shard, and takes "
                "what is there then."
            )
        return Outcome([known], 0)
    file, limits = files[shard], inbox_limits(stage)
    columns = stage.settings.candidates.columns
    source = RecordFile(
        path=file.path,
        sha256=file.sha256,
        table="candidates",
        rejects="rejects",
        fields="candidate_fields",
        partition=shard,
        schema=CANDIDATE_SCHEMA,
        read=partial(iter_examples, kind="candidate", limits=limits, columns=columns),
        inside=limits.inside,
        columns=columns,
        may_be_unreadable=True,
    )
    rows, rejects, computed = encode_file(stage, source)
    rejected = rejects.notes["rows"]
    first_rejects = stage.lake.read_first(rejects, _SHOWN).to_pylist()
    trouble = next((one["reason"] for one in first_rejects if one["field"] == WHOLE_FILE), "")
    truncated = rows.notes.get("truncated", 0)
    shown = stage.lake.read_first(rows, _SHOWN, ["line", "source", "prompt", "completion", "tokens"])
    return Outcome(
        [rows],
        computed,
        {
            "dagster/row_count": rows.notes["rows"],
            "rejects": rejected,
            "truncated": truncated,
            "unused_fields": ", ".join(rows.notes.get("unused_fields", [])),
            "completion_tokens": rows.notes["completion_tokens"],
            "file": str(file.path),
            "rows": preview(shown.to_pylist()),
            "first_rejects": preview(first_rejects),
        },
        [
            FILE_READABLE(not trouble, reason=trouble or "the file was read"),
            ROWS_ACCEPTED(not rejected, rejected=rejected, accepted=rows.notes["rows"]),
            PROMPTS_WHOLE(not truncated, truncated=truncated, rows=rows.notes["rows"]),
        ],
    )
