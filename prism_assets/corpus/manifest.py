"""Which rows of a pool count: duplicates across shards and rows equal to a target or held-out record do not."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prism_assets.corpus.token_tables import column_sum
from prism_assets.identity import shard_name
from prism_assets.tables import schema_of

MANIFEST_SCHEMA = schema_of("live_pool")


def manifest(
    shards: Mapping[str, pa.Table], fingerprints: Mapping[str, str], forbidden: set[str]
) -> tuple[pa.Table, dict[str, Any]]:
    """One row per shard with the positions of the rows that do not count, and why; and totals.

    `shards`: key -> id, source and completion_tokens of its rows. Of equal ids the first in order of the keys counts;
    an id of `forbidden` is contamination and never counts.
    """
    ids = pa.concat_arrays([pa.array([], pa.string()), *(c for table in shards.values() for c in table["id"].chunks)])
    contaminated = pc.is_in(ids, value_set=pa.array(sorted(forbidden), pa.string())).to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]
    codes = ids.dictionary_encode().indices.to_numpy()
    repeated = np.ones(len(codes), dtype=bool)
    repeated[np.unique(codes, return_index=True)[1]] = False  # the first in order of the shard keys stays
    left_out = contaminated | repeated
    sources: dict[str, int] = {}
    rows = []
    first = 0
    for key, table in shards.items():
        its = slice(first, first + table.num_rows)
        first += table.num_rows
        excluded = np.flatnonzero(left_out[its])
        counted = table.filter(pa.array(~left_out[its]))
        for entry in pc.value_counts(counted["source"]).to_pylist():  # pyright: ignore[reportAttributeAccessIssue]
            source = entry["values"] or shard_name(key)
            sources[source] = sources.get(source, 0) + entry["counts"]
        rows.append(
            {
                "shard": key,
                "candidates_fingerprint": fingerprints[key],
                "rows": table.num_rows,
                "canonical_rows": counted.num_rows,
                "completion_tokens": column_sum(counted, "completion_tokens"),
                "excluded_rows": excluded,
                "excluded_reasons": np.where(contaminated[its][excluded], "contamination", "duplicate").tolist(),
            }
        )
    reasons = [reason for row in rows for reason in row["excluded_reasons"]]
    notes = {
        "canonical_rows": sum(row["canonical_rows"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "duplicates": reasons.count("duplicate"),
        "contaminated": reasons.count("contamination"),
        "sources": dict(sorted(sources.items(), key=lambda item: (-item[1], item[0]))),
    }
    return pa.Table.from_pylist(rows, MANIFEST_SCHEMA), notes
