"""JSON text as a value, the one way in which records and the JSON texts inside of them are read."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from prism_assets.corpus.limits import Limits, require_depth
from prism_assets.corpus.records import BadRecord


def json_value(text: str, raw: bytes | None = None, limits: Limits = Limits()) -> Any:
    """The value of a JSON text; `raw` is the same text as bytes, where it is at hand.

    Raises ValueError for text that is no JSON, and `BadRecord` for JSON that is not taken: an object with a name twice
    (of which one would be lost), arrays and objects too deep within each other.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise BadRecord("", "invalid JSON: nested too deeply") from None
    if isinstance(value, dict | list):
        require_depth(value, text.encode("utf-8", "surrogatepass") if raw is None else raw, limits)
    return value


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise BadRecord(repeated, "given twice in one object; keep one")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_object_without_repeats)
