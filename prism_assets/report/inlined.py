"""What a page carries with it: scripts and styles of the package, its data as JSON, and the policy that lets these
scripts run and nothing else.

`vendor/README.md` names the libraries, their versions and licences.
"""

import base64
import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prism_assets.text import visible

_HERE = Path(__file__).parent
# In the order in which they run: the last one uses the others.
_SCRIPTS = ("vendor/tablesort.js", "vendor/tabulator.js", "vendor/chart.js", "report.js")
_STYLES = ("vendor/tabulator.css",)
# What would end a script, or begin a part of one that hides its end.
_NEVER_IN_A_SCRIPT = ("</script", "<!--")


@cache
def scripts() -> list[Markup]:
    """The scripts of a page, in the order in which they run."""
    found = [(_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    assert not any(never in text.lower() for text in found for never in _NEVER_IN_A_SCRIPT)
    return [Markup(text) for text in found]


@cache
def styles() -> list[Markup]:
    """The style sheets of the libraries."""
    return [Markup((_HERE / name).read_text(encoding="utf-8")) for name in _STYLES]


@cache
def content_policy() -> Markup:
    """The Content-Security-Policy of a page: these very scripts run, and nothing is fetched from or sent to anywhere.

    Style is not limited to hashes, because the libraries place what they draw by it.
    """
    hashes = " ".join(f"'sha256-{_hash(text)}'" for text in scripts())
    return Markup(
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; connect-src 'none'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def data_block(value: Any) -> Markup:
    """A JSON value for a `<script type="application/json">`: nothing in it can end the block or be markup, and each of
    its texts is as `text.visible`. Numbers that JSON has not are null."""
    written = json.dumps(_visible(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(written.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _visible(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(str(name)): _visible(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
