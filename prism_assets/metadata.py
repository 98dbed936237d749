"""What assets show in the Dagster UI: previews of rows, pictures, where columns come from."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from prism_assets.project import Project
from prism_assets.text import one_line, visible

_CELL_WIDTH = 100


def harmless(value: Any) -> Any:
    """A value of an asset's or a check's metadata with its texts as `text.visible`; Markdown is made harmless where it
    is written."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dg.JsonMetadataValue):
        return dg.MetadataValue.json(harmless(value.data))
    if isinstance(value, Mapping):
        return {harmless(name): harmless(one) for name, one in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return [harmless(one) for one in value]
    return value


def preview(rows: Sequence[Mapping[str, Any]], limit: int = 8) -> dg.MetadataValue:
    """The first rows as a table, each text on one line of at most `_CELL_WIDTH` characters."""
    if not rows:
        return dg.MetadataValue.text("no rows")

    def cell(value: Any) -> str | int | float | bool | None:
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return float(f"{value:.4g}")
        return one_line(str(value), _CELL_WIDTH)

    records = [dg.TableRecord({visible(str(name)): cell(row.get(name)) for name in rows[0]}) for row in rows[:limit]]
    columns = [dg.TableColumn(visible(str(name)), _kind(row.get(name) for row in rows[:limit])) for name in rows[0]]
    return dg.MetadataValue.table(records, dg.TableSchema(columns=columns))


def _kind(values: Any) -> str:
    present = [value for value in values if value is not None]
    for kind, name in ((bool, "bool"), (int, "int"), (float, "float")):
        if present and all(isinstance(value, kind) for value in present):
            return name
    return "string"


def picture(png: bytes, alt: str = "plot") -> dg.MetadataValue:
    """A PNG image."""
    from prism_assets.plots import as_markdown_image

    return dg.MetadataValue.md(as_markdown_image(png, alt))


def column_lineage(project: Project, **columns: tuple[str, str]) -> dict[str, Any]:
    """Metadata that says which column of which asset each column was copied from: name=(asset, column)."""
    return {
        "dagster/column_lineage": dg.TableColumnLineage(
            {
                name: [dg.TableColumnDep(asset_key=project.key(asset), column_name=column)]
                for name, (asset, column) in columns.items()
            }
        )
    }
