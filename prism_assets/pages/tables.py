"""docs/reference/tables.md, from the registry and the views of the catalogue."""

import re
import sys
import tempfile
from collections.abc import Mapping

from prism_assets.catalog import views
from prism_assets.entries import Table
from prism_assets.pages.markdown import codes, page, table
from prism_assets.tables import ASSETS

_HEAD = """# Tables and views

Made from the registry and the catalogue by `python -m prism_assets.pages`. [Read a lake from
elsewhere](../howto/read-the-lake.md) has examples.

## Views

What `prism sql` and `prism.duckdb` show, with the columns that are there in an empty lake too. A table below that has
no view of its own name is shown as it is; every Parquet table as it is stored is under `raw.`, with `partition`,
`version`, `fingerprint` and `file_row_number` added.
"""
_TABLES = """## Tables

An artefact is a file or a folder `<storage.root>/artifacts/<table>/<fingerprint>`. The stage version is raised where
the same inputs get other results. The scope is what heads are kept under, so that results of different settings lie
side by side ([design](../design.md#heads-and-scopes)). Tables without columns here hold tensors or files, or their
columns are not promised.
"""
_OWN = ("artifacts", "heads", "lineage")
_OWN_WORDS = {
    "artifacts": "one row per artefact, with its header",
    "heads": "which artefact each partition shows now",
    "lineage": "one row per artefact and input",
}
_SCOPES = {"none": "–", "corpus": "corpus version", "warmup": "warm-up scope", "features": "feature version"}


def tables_page() -> str:
    """The page as Markdown: views with their columns, then the tables of each asset."""
    columns, words = _columns_of_views(), _words_of_views()
    shown = [[f"`{one}`", words[one], codes(columns[one])] for one in (*views.VIEWS, *_OWN)]
    rows = [
        [
            f"[`{one.name}`](#{one.name})",
            f"[`{asset.name}`](assets.md#{asset.name})",
            str(one.version),
            _SCOPES[one.scope],
        ]
        for asset in ASSETS
        for one in asset.tables
    ]
    parts = [_HEAD, table(["view", "what it has", "columns"], shown), _TABLES]
    parts.append(table(["table", "asset", "stage version", "scope"], rows))
    for one in (each for asset in ASSETS for each in asset.tables):
        parts += [f"### `{one.name}`", _described(one)]
    return page(*parts)


def _described(entry: Table) -> str:
    """The columns with their types, and which of them hold fingerprints."""
    if entry.columns is None:
        return "No columns are promised."
    columns = ", ".join(f"`{name}` {kind}" for name, kind in entry.columns.items())
    named = [f"`{name}` holds fingerprints of `{other}`." for name, other in entry.rows_name.items()]
    return " ".join([columns + ".", *named])


def _columns_of_views() -> Mapping[str, list[str]]:
    """The columns of every view, asked of DuckDB over an empty lake."""
    from prism_assets.catalog.sql import connect
    from prism_assets.resources.lake import Lake

    with tempfile.TemporaryDirectory() as folder, connect(Lake(root=folder)) as connection:
        return {
            name: [row[0] for row in connection.execute(f'DESCRIBE main."{name}"').fetchall()]
            for name in (*views.VIEWS, *_OWN)
        }


def _words_of_views() -> dict[str, str]:
    """What the docstring of the module says of each view."""
    found = dict(re.findall(r"^    ([a-z_]+)  +(\S.*)$", views.__doc__ or "", re.MULTILINE))
    return {name: found[name].partition(": shard")[0] for name in views.VIEWS} | _OWN_WORDS


if __name__ == "__main__":
    sys.stdout.write(tables_page())  # of the code, none of it data
