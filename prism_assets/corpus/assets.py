"""Corpus: inbox files become shards of tokenised candidates; target and eval files become tokenised targets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from prism_assets import stage
from prism_assets.partitions import shards, targets_of
from prism_assets.settings import Settings
from resources.lake import Artifact, Lake, Recipe, digest, hash_file
from resources.language_model import LanguageModel, ModelError

if TYPE_CHECKING:
    import pyarrow as pa

    from prism_assets.corpus.examples import Reject
    from prism_assets.corpus.inbox import InboxFile
    from prism_assets.corpus.tokenization import Encoder

VERSION = 1  # raised by hand when rows, ids or tokens change for the same file and settings
POOL_VERSION = 1

GROUP = "corpus"


class UnusableTargets(Exception):
    """A target or eval file is missing or has no usable row; the message says which and why."""


def corpus_version(settings: Settings, model: LanguageModel) -> str:
    """What tokens depend on beside the records: tokenizer and template. Heads of the corpus are kept under it."""
    return digest([VERSION, model.identify().tokenizer, settings.tokenization.model_dump()])[:12]


def require_context(settings: Settings, model: LanguageModel) -> None:
    """Raise ModelError where examples may be longer than the model's context."""
    longest, context = settings.tokenization.max_length, model.identify().context_length
    if context is not None and longest > context:
        raise ModelError(
            f"tokenization.max_length is {longest}, but the model's context has {context} tokens: "
            f"set it to {context} or less."
        )


def encoder_of(settings: Settings, model: LanguageModel) -> "Encoder":
    """The one way records become tokens. Raises ModelError as `require_context`."""
    from prism_assets.corpus.tokenization import Encoder

    require_context(settings, model)
    options = settings.tokenization
    return Encoder(
        model.tokenizer(), max_length=options.max_length, template=options.template, separator=options.separator
    )


def inbox_files(settings: Settings, lake: Lake, at_rest_seconds: float | None = None) -> "Mapping[str, InboxFile]":
    """The files of the inbox by shard key."""
    from prism_assets.corpus.inbox import scan

    rest = settings.candidates.at_rest_seconds if at_rest_seconds is None else at_rest_seconds
    found = scan(settings.candidates.inbox, cache_path=lake.cache / "inbox.json", at_rest_seconds=rest)
    return {file.key: file for file in found.files}


def pending_candidates(settings: Settings, lake: Lake, model: LanguageModel, keys: Sequence[str]) -> list[str]:
    """The shards among `keys` that are not ingested under today's tokenizer and settings, or whose rows got damaged."""
    version = corpus_version(settings, model)
    return [key for key in keys if any(lake.head(table, key, version) is None for table in ("candidates", "rejects"))]


@dg.asset(
    partitions_def=shards,
    group_name=GROUP,
    kinds={"parquet"},
    code_version=str(VERSION),
    deps=["base_model"],
    backfill_policy=dg.BackfillPolicy.single_run(),
    check_specs=[
        dg.AssetCheckSpec("file_readable", asset="candidates", description="The inbox file can be read at all."),
        dg.AssetCheckSpec("rows_accepted", asset="candidates", description="No row of the file was rejected."),
    ],
)
def candidates(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    lake: Lake,
    language_model: LanguageModel,
) -> dg.MaterializeResult:
    """Candidate examples of one inbox file, validated, de-duplicated within the file and tokenised once.

    What is refused stands in the table `rejects` with line, field and reason. A file that cannot be read at all
    yields no rows and fails the check `file_readable`; other files go on.
    """
    files = inbox_files(settings, lake, at_rest_seconds=0)
    version = corpus_version(settings, language_model)

    def ingest(shard: str | None) -> stage.Outcome:
        from prism_assets.corpus.examples import Reject, UnreadableFile

        if shard not in files:
            known = lake.head("candidates", shard, version)
            if known is None:
                raise dg.Failure(
                    f"Shard {shard} is no longer in the inbox {settings.candidates.inbox}: its file was edited, renamed "
                    "or removed before it could be read. It will be retired at the next look at the inbox."
                )
            return stage.Outcome([known], 0)
        recipe = Recipe(
            "candidates",
            VERSION,
            settings=settings.tokenization.model_dump(),
            inputs={"file": files[shard].sha256, "tokenizer": language_model.identify().tokenizer},
            partition=shard,
            version=version,
        )
        trouble = ""

        def read(path: Path) -> "tuple[list, list[Reject]]":
            nonlocal trouble
            from prism_assets.corpus.examples import read_examples

            try:
                return read_examples(path, "candidate")
            except UnreadableFile as error:
                trouble = str(error)
                return [], [Reject(0, "file", trouble, "")]

        rows, rejects, computed = _publish_examples(
            recipe, "rejects", files[shard].path, read, settings, language_model, lake, context.run_id
        )
        lake.point(rows, shard, version, context.run_id)
        lake.point(rejects, shard, version, context.run_id)
        refused = lake.read_table(rejects).to_pylist()
        trouble = trouble or next((one["reason"] for one in refused if one["field"] == "file"), "")
        return stage.Outcome(
            [rows],
            computed,
            metadata={
                "dagster/row_count": rows.notes["rows"],
                "rejects": len(refused),
                "completion_tokens": rows.notes["completion_tokens"],
                "file": str(files[shard].path),
                "rows": stage.preview(
                    lake.read_table(rows, ["line", "source", "prompt", "completion", "tokens"]).slice(0, 8).to_pylist()
                ),
                "first_rejects": stage.preview(refused),
            },
            checks={
                "file_readable": (not trouble, {"reason": trouble or "the file was read"}),
                "rows_accepted": (not refused, {"rejected": len(refused), "accepted": rows.notes["rows"]}),
            },
        )

    return stage.each_partition(context, ingest, {"file_readable": dg.AssetCheckSeverity.ERROR})


def _publish_examples(
    recipe: Recipe,
    rejects_table: str,
    path: Path,
    read: Any,
    settings: Settings,
    model: LanguageModel,
    lake: Lake,
    run_id: str,
) -> tuple[Artifact, Artifact, int]:
    """Read a file into two tables, accepted rows and rejects; both are found where they exist already."""
    import pyarrow as pa

    from prism_assets.corpus.tokenization import (
        CANDIDATE_SCHEMA,
        REJECTS_SCHEMA,
        TARGET_SCHEMA,
        encode_all,
        to_table,
    )

    refused_recipe = Recipe(
        rejects_table,
        recipe.stage_version,
        recipe.settings,
        {**recipe.inputs, "of": recipe.table},
        partition=recipe.partition,
        version=recipe.version,
    )
    rows, rejects = lake.find(recipe), lake.find(refused_recipe)
    if rows is not None and rejects is not None:
        return rows, rejects, 0
    examples, refused = read(path)
    if hash_file(path) != recipe.inputs["file"]:
        # Rows of one content must never stand under the fingerprint of another.
        raise dg.Failure(f"{path} was changed while it was read. The next run takes it as it is then.")
    tokenized, untokenizable = encode_all(examples, encoder_of(settings, model))
    schema = CANDIDATE_SCHEMA if recipe.table == "candidates" else TARGET_SCHEMA
    table = to_table(examples, tokenized, schema)
    all_refused = sorted([*refused, *untokenizable], key=lambda reject: reject.line)
    rejects = lake.publish_table(
        refused_recipe, pa.Table.from_pylist([one._asdict() for one in all_refused], REJECTS_SCHEMA), run_id=run_id
    )
    notes = {
        "completion_tokens": _sum(table, "completion_tokens"),
        "tokens": _sum(table, "tokens"),
        "duplicates": sum("duplicate" in one.reason for one in all_refused),
    }
    return lake.publish_table(recipe, table, run_id=run_id, notes=notes), rejects, 1


def _sum(table: "pa.Table", column: str) -> int:
    import pyarrow.compute as pc

    return pc.sum(table[column]).as_py() or 0


def build_targets(settings: Settings) -> dg.AssetsDefinition:
    """The asset `targets`, one partition per target of the settings."""

    @dg.asset(
        partitions_def=targets_of(settings),
        group_name=GROUP,
        kinds={"parquet"},
        code_version=str(VERSION),
        deps=["base_model"],
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=[
            dg.AssetCheckSpec("target_rows_accepted", asset="targets", description="No target or eval row was rejected."),
            dg.AssetCheckSpec("eval_disjoint", asset="targets", description="No eval record is a target example."),
        ],
    )
    def targets(
        context: dg.AssetExecutionContext,
        settings: dg.ResourceParam[Settings],
        lake: Lake,
        language_model: LanguageModel,
    ) -> dg.MaterializeResult:
        """Target examples (plain, or pairs of a wanted and an unwanted completion) and held-out eval records."""
        version = corpus_version(settings, language_model)

        def read_files(name: str | None) -> stage.Outcome:
            from prism_assets.corpus.examples import read_examples

            published: list[Artifact] = []
            refused: list[dict[str, Any]] = []
            computed = 0
            for table, kind, path in (
                ("targets", "target", settings.targets[name].examples),
                ("eval_examples", "eval", settings.targets[name].eval),
            ):
                if not path.is_file():
                    raise UnusableTargets(f"targets.{name}: there is no file {path}")
                recipe = Recipe(
                    table,
                    VERSION,
                    settings=settings.tokenization.model_dump(),
                    inputs={"file": hash_file(path), "tokenizer": language_model.identify().tokenizer},
                    partition=name,
                    version=version,
                )
                rows, rejects, made = _publish_examples(
                    recipe,
                    f"{table}_rejects",
                    path,
                    lambda file, kind=kind: read_examples(file, kind),
                    settings,
                    language_model,
                    lake,
                    context.run_id,
                )
                if not rows.notes["rows"]:
                    first = lake.read_table(rejects).slice(0, 1).to_pylist()
                    why = f" The first is refused because: {first[0]['reason']}." if first else ""
                    raise UnusableTargets(f"targets.{name}: {path} holds no usable row.{why}")
                if kind == "target":
                    _require_fitting_score(settings, lake, rows, name)
                lake.point(rows, name, version, context.run_id)
                lake.point(rejects, name, version, context.run_id)
                refused += [{"file": path.name, **one} for one in lake.read_table(rejects).to_pylist()]
                published.append(rows)
                computed += made
            overlap = _conversations(lake, published[0]) & _conversations(lake, published[1])
            return stage.Outcome(
                published,
                computed,
                metadata={
                    "dagster/row_count": published[0].notes["rows"],
                    "eval_rows": published[1].notes["rows"],
                    "rejects": len(refused),
                    "rows": stage.preview(
                        lake.read_table(published[0], ["line", "prompt", "completion", "rejected"]).slice(0, 8).to_pylist()
                    ),
                    "first_rejects": stage.preview(refused),
                },
                checks={
                    "target_rows_accepted": (not refused, {"rejected": len(refused)}),
                    "eval_disjoint": (not overlap, {"shared_records": len(overlap)}),
                },
            )

        return stage.each_partition(context, read_files)

    return targets


def _require_fitting_score(settings: Settings, lake: Lake, targets: Artifact, name: str) -> None:
    """Raise UnusableTargets for summed scores of pairs: better now than after the gradients of the whole pool."""
    if settings.preference.score == "sum" and any(lake.read_table(targets, ["rejected"])["rejected"].is_valid().to_pylist()):
        raise UnusableTargets(
            f"targets.{name}: preference.score: sum is for plain targets, and these are pairs, whose sides have no common "
            "number of tokens. Use mean."
        )


def _conversations(lake: Lake, artifact: Artifact) -> set[str]:
    """Ids of targets or eval records as conversations: a pair counts as its wanted completion."""
    return set(lake.read_table(artifact, ["conversation_id"])["conversation_id"].to_pylist())


def live_shards(lake: Lake, keys: Sequence[str], version: str) -> dict[str, Artifact]:
    """The ingested shards among `keys`, in key order."""
    found = {key: lake.head("candidates", key, version) for key in sorted(keys)}
    return {key: artifact for key, artifact in found.items() if artifact is not None}


@dg.asset(
    group_name=GROUP,
    kinds={"parquet"},
    code_version=str(POOL_VERSION),
    deps=[dg.AssetDep("candidates", partition_mapping=dg.AllPartitionMapping()), "targets"],
    check_specs=[
        dg.AssetCheckSpec("nothing_pending", asset="live_pool", description="Every live shard has been ingested."),
        dg.AssetCheckSpec("no_contamination", asset="live_pool", description="No candidate is a target or eval record."),
    ],
)
def live_pool(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    lake: Lake,
    language_model: LanguageModel,
) -> dg.MaterializeResult:
    """The manifest: the live shards, and which of their rows do not count.

    A row that stands in several shards counts once, in the shard with the smallest key. A row equal to a target
    or eval record is kept out of every ranking. Shares, budgets and top-k count the rows that remain.
    """
    version = corpus_version(settings, language_model)
    keys = context.instance.get_dynamic_partitions(shards.name)
    live = live_shards(lake, keys, version)
    if not live:
        raise dg.Failure(f"No candidates: put JSON Lines or Parquet files into {settings.candidates.inbox}.")
    held_back = [
        lake.require(table, name, version) for name in settings.targets for table in ("targets", "eval_examples")
    ]

    def publish(_: str | None) -> stage.Outcome:
        recipe = Recipe(
            "live_pool",
            POOL_VERSION,
            settings={"shards": list(live)},
            inputs={"candidates": list(live.values()), "held_back": held_back},
            version=version,
        )
        artifact = lake.find(recipe)
        computed = artifact is None
        if artifact is None:
            table, notes = _manifest(lake, live, held_back)
            artifact = lake.publish_table(recipe, table, run_id=context.run_id, notes=notes)
        lake.point(artifact, None, version, context.run_id)
        notes = artifact.notes
        if not notes["canonical_rows"]:
            raise dg.Failure(
                f"No candidate is left: every row of the {len(live)} files in {settings.candidates.inbox} was rejected "
                f"or is a target or eval record ({notes['contaminated']}). The table `rejects` has the reasons."
            )
        pending = sorted(set(keys) - set(live))
        return stage.Outcome(
            [artifact],
            int(computed),
            metadata={
                "dagster/row_count": notes["canonical_rows"],
                "shards": len(live),
                "duplicates_across_shards": notes["duplicates"],
                "contaminated": notes["contaminated"],
                "completion_tokens": notes["completion_tokens"],
                "sources": dg.MetadataValue.json(notes["sources"]),
                "rows": stage.preview(
                    lake.read_table(artifact, ["shard", "rows", "canonical_rows", "completion_tokens"]).to_pylist()
                ),
            },
            checks={
                "nothing_pending": (not pending, {"pending": len(pending), "shards": ", ".join(pending[:20])}),
                "no_contamination": (not notes["contaminated"], {"excluded": notes["contaminated"]}),
            },
        )

    return stage.each_partition(context, publish)


def _manifest(
    lake: Lake, live: Mapping[str, Artifact], held_back: Sequence[Artifact]
) -> "tuple[pa.Table, dict[str, Any]]":
    """One row per live shard with the positions of the rows that do not count, and why."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    forbidden = set().union(*(_conversations(lake, artifact) for artifact in held_back)) if held_back else set()
    tables = [lake.read_table(artifact, ["id", "source", "completion_tokens"]) for artifact in live.values()]
    ids = pa.concat_arrays([pa.array([], pa.string()), *(chunk for table in tables for chunk in table["id"].chunks)])
    contaminated = pc.is_in(ids, value_set=pa.array(sorted(forbidden), pa.string())).to_numpy(zero_copy_only=False)
    codes = ids.dictionary_encode().indices.to_numpy()
    repeated = np.ones(len(codes), dtype=bool)
    repeated[np.unique(codes, return_index=True)[1]] = False  # the first in order of the shard keys stays
    left_out = contaminated | repeated
    sources: dict[str, int] = {}
    rows = []
    first = 0
    for (key, artifact), table in zip(live.items(), tables, strict=True):
        its = slice(first, first + table.num_rows)
        first += table.num_rows
        excluded = np.flatnonzero(left_out[its])
        counted = table.filter(pa.array(~left_out[its]))
        for entry in pc.value_counts(counted["source"]).to_pylist():
            source = entry["values"] or shard_name(key)
            sources[source] = sources.get(source, 0) + entry["counts"]
        rows.append(
            {
                "shard": key,
                "candidates_fingerprint": artifact.fingerprint,
                "rows": table.num_rows,
                "canonical_rows": counted.num_rows,
                "completion_tokens": _sum(counted, "completion_tokens"),
                "excluded_rows": excluded,
                "excluded_reasons": np.where(contaminated[its][excluded], "contamination", "duplicate").tolist(),
            }
        )
    schema = pa.schema(
        [
            ("shard", pa.string()),
            ("candidates_fingerprint", pa.string()),
            ("rows", pa.int64()),
            ("canonical_rows", pa.int64()),
            ("completion_tokens", pa.int64()),
            ("excluded_rows", pa.list_(pa.int32())),
            ("excluded_reasons", pa.list_(pa.string())),
        ]
    )
    reasons = [reason for row in rows for reason in row["excluded_reasons"]]
    notes = {
        "canonical_rows": sum(row["canonical_rows"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "duplicates": reasons.count("duplicate"),
        "contaminated": reasons.count("contamination"),
        "sources": dict(sorted(sources.items(), key=lambda item: (-item[1], item[0]))),
    }
    return pa.Table.from_pylist(rows, schema), notes


def shard_name(key: str) -> str:
    """The file name part of a shard key `<name>-<content hash>`."""
    return key.rpartition("-")[0] or key
