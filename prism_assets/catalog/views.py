"""`prism sql`: the lake's tables under friendly names, for DuckDB.

Beside the lake's own tables (`raw.<table>`, and `<table>` where no view below has that name), `artifacts`, `heads`
and `lineage` there are

    candidates          rows of all shards, with why they are excluded: shard, row, id, …, status
    candidate_fields    what their records hold beside the conversation, as JSON: shard, row, id, line, fields
    rejects             records that were not accepted, of shards, target files and held-out files
    features            rows of gradient features: shard, row, id, vector, norm, …
    weights             weight of every target example under each strategy
    scores              the selected rows of every target and strategy, with rank and score
    selections          one row per selection, current or earlier
    evaluations         one row per target, strategy and seed
    evaluation_records  one row per held-out record of these
    benchmarks          one row per target, strategy, seed and metric of a benchmark
    trials              one row per target, strategy, split and seed of the experiments, with cost
    experiments         their means, deviations and paired differences (`other` is the strategy subtracted)

All are there, with their columns, also while the lake is empty. Vectors can be multiplied; this ranks the candidates
by their similarity to one of them in gradient space:

    SELECT other.id, list_dot_product(one.vector, other.vector) AS similarity
    FROM features one JOIN features other USING (version)
    WHERE one.id = '…' ORDER BY similarity DESC LIMIT 10
"""

from prism_assets.resources.lake import CatalogAdditions
from prism_assets.tables import tables

# A partition of target and strategy is written strategy|target, of one seed strategy|target/seed-N.
_STRATEGY = """split_part({0}, '|', 1)"""
_TARGET = r"""regexp_extract({0}, '^[^|]*\|(.*?)(/seed-(-?[0-9]+))?$', 1)"""
_SEED = r"""TRY_CAST(regexp_extract({0}, '/seed-(-?[0-9]+)$', 1) AS INTEGER)"""


def _key(column: str, seed: bool = False) -> str:
    """The columns target, strategy and (where asked for) seed of a partition."""
    parts = [f"{_TARGET} AS target", f"{_STRATEGY} AS strategy", *([f"{_SEED} AS seed"] if seed else [])]
    return ", ".join(parts).format(column)


VIEWS: dict[str, str] = {
    "candidates": """
        WITH excluded AS (
            SELECT version, shard, unnest(excluded_rows) AS "row", unnest(excluded_reasons) AS reason
            FROM raw.live_pool
        )
        SELECT c."partition" AS shard, c.file_row_number AS "row",
            c.* EXCLUDE ("partition", version, fingerprint, file_row_number, rejected, answers),
            CASE WHEN p.shard IS NULL THEN 'retired' ELSE coalesce(e.reason, 'canonical') END AS status,
            c.version
        FROM raw.candidates c
        LEFT JOIN raw.live_pool p ON p.version = c.version AND p.shard = c."partition"
        LEFT JOIN excluded e
            ON e.version = c.version AND e.shard = c."partition" AND e."row" = c.file_row_number
    """,
    "candidate_fields": """
        SELECT "partition" AS shard, file_row_number AS "row", id, line, fields::JSON AS fields, version
        FROM raw.candidate_fields
    """,
    "rejects": """
        SELECT 'candidates' AS kind, "partition" AS name, line, field, reason, excerpt, version FROM raw.rejects
        UNION ALL
        SELECT 'targets', "partition", line, field, reason, excerpt, version FROM raw.targets_rejects
        UNION ALL
        SELECT 'eval', "partition", line, field, reason, excerpt, version FROM raw.eval_examples_rejects
    """,
    "features": """
        WITH blocks AS (
            SELECT "partition" AS shard, version, block, coalesce(sum("rows") OVER (
                PARTITION BY "partition", version ORDER BY file_row_number
                ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)::BIGINT AS first_row
            FROM raw.candidate_features
        )
        SELECT s.shard, s.first_row + b.file_row_number AS "row", b.id, b.vector, b.norm, b.gradient_norm,
            b.mean_log_prob, b.refused, b.version, s.block
        FROM blocks s JOIN raw.feature_blocks b ON b.fingerprint = s.block AND b.version = s.version
    """,
    "weights": """
        SELECT target, strategy, id, "group", prompt, completion, weight, score, preference, gradient_norm, version
        FROM (SELECT "partition" AS target, * EXCLUDE ("partition", fingerprint, file_row_number)
              FROM raw.target_weights)
        UNPIVOT INCLUDE NULLS (weight FOR strategy IN (COLUMNS(
            * EXCLUDE (target, id, "group", prompt, completion, score, preference, gradient_norm, version))))
    """,
    "scores": f"""
        SELECT {_key('"partition"')}, "rank", score, id, shard, "row", source, prompt, completion,
            completion_tokens, fingerprint AS selection
        FROM raw.selection
    """,
    "selections": f"""
        WITH named AS (
            SELECT "partition", fingerprint, true AS current FROM heads WHERE table_name = 'selection'
            UNION ALL
            SELECT "partition", fingerprint, false FROM artifacts
            WHERE table_name = 'selection' AND "partition" NOT LIKE '%/split-%' AND fingerprint NOT IN (
                SELECT fingerprint FROM heads WHERE table_name = 'selection')
        )
        SELECT {_key('n."partition"')}, n.current, (a.notes->>'rows')::BIGINT AS "rows",
            (a.notes->>'completion_tokens')::BIGINT AS completion_tokens,
            (a.notes->>'pool_rows')::BIGINT AS pool_rows, (a.notes->>'refused_rows')::BIGINT AS refused_rows,
            (a.notes->>'non_positive_influence')::BIGINT AS non_positive_influence,
            a.notes->'composition' AS composition, a.settings->'budget' AS budget, a.version, a.created,
            a.run_id, a.fingerprint, a.content_hash, a.file
        FROM named n JOIN artifacts a ON a.table_name = 'selection' AND a.fingerprint = n.fingerprint
    """,
    "evaluations": f"""
        SELECT {_key('h."partition"', seed=True)}, (a.notes->>'target_preference')::DOUBLE AS target_preference,
            (a.notes->>'mean_log_prob')::DOUBLE AS mean_log_prob, (a.notes->>'exact_match')::DOUBLE AS exact_match,
            (a.notes->>'pair_accuracy')::DOUBLE AS pair_accuracy, (a.notes->>'margin')::DOUBLE AS margin,
            (a.notes->>'unwanted_avoided')::DOUBLE AS unwanted_avoided,
            (a.notes->>'choice_accuracy')::DOUBLE AS choice_accuracy,
            (a.notes->>'records')::BIGINT AS records, a.created, a.run_id, a.fingerprint, a.content_hash
        FROM heads h JOIN artifacts a ON a.table_name = 'evaluations' AND a.fingerprint = h.fingerprint
        WHERE h.table_name = 'evaluations'
    """,
    "evaluation_records": f"""
        SELECT {_key('"partition"', seed=True)}, id, mean_log_prob, margin, prediction, exact_match, unwanted_answer,
            choice_correct, fingerprint
        FROM raw.evaluations
    """,
    "benchmarks": f"""
        SELECT {_key('"partition"', seed=True)}, task, metric, filter, value, higher_is_better, documents, shots,
            task_version, asked, fingerprint
        FROM raw.benchmarks
    """,
    "trials": """
        SELECT t.* EXCLUDE ("partition", file_row_number),
            list_sum((a.notes->'$.costs[*].cpu_seconds')::DOUBLE[]) AS cpu_seconds,
            list_sum((a.notes->'$.costs[*].gpu_seconds')::DOUBLE[]) AS gpu_seconds
        FROM raw.trials t JOIN artifacts a ON a.table_name = 'trials' AND a.fingerprint = t.fingerprint
    """,
    "experiments": 'SELECT * EXCLUDE ("partition", file_row_number) FROM raw.experiments',
}


def additions() -> CatalogAdditions:
    """The columns that the registry promises for each table, and the views."""
    columns = {table.name: table.columns for table in tables() if table.columns is not None}
    views = [f'CREATE OR REPLACE VIEW main."{name}" AS {" ".join(query.split())}' for name, query in VIEWS.items()]
    return CatalogAdditions(columns, views)
