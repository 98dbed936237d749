"""The fields of a record that are no part of its conversation, as JSON text: what the user wrote beside it is kept."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection, Mapping
from json.encoder import encode_basestring as _quoted
from typing import Any


def other_fields(record: Mapping[str, Any], used: Collection[str]) -> str:
    """The fields of a record but those `used`, as the JSON text of one object; null counts as absent.

    Values that JSON cannot hold are written as text: dates and times in ISO 8601, decimals and numbers that are not
    finite as digits or names, bytes in base64.
    """
    kept = {name: value for name, value in record.items() if name not in used and value is not None}
    if not kept:
        return "{}"
    if all(type(name) is str and type(value) in (str, int) for name, value in kept.items()):
        # The same text as an encoder's, which takes longer to be made than this: it is done for every record.
        values = [f"{_quoted(name)}: {_quoted(one) if type(one) is str else one}" for name, one in kept.items()]
        text = f"{{{', '.join(values)}}}"
    else:
        text = _to_json(kept)
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: it stays an escape
        return _to_json(kept, ascii_only=True)
    return text


def _to_json(value: Any, ascii_only: bool = False) -> str:
    try:
        if not ascii_only:
            return _ENCODER.encode(value)
        return json.dumps(value, ensure_ascii=ascii_only, default=_as_text, allow_nan=False)
    except (ValueError, TypeError):  # numbers that are not finite, or keys that are no strings
        return json.dumps(_plain(value), ensure_ascii=ascii_only, default=_as_text)


def _plain(value: Any) -> Any:
    """The same value with all numbers finite and all keys strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _as_text(value: Any) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


_ENCODER = json.JSONEncoder(ensure_ascii=False, default=_as_text, allow_nan=False)
