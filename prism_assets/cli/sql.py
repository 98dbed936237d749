"""`prism sql`: one SELECT over the lake."""

from typing import Annotated

import typer

from prism_assets.cli.common import (
    AsJson,
    Config,
    app,
    expected_failures,
    print_json,
    print_table,
    read_settings,
    say,
    short,
)
from prism_assets.cli.formats import AsFormat, chosen, write_rows


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One SELECT; `DESCRIBE candidates` and `SHOW ALL TABLES` work too.")],
    limit: Annotated[int, typer.Option(min=0, help="Rows of a table or of JSON at most; 0 prints all.")] = 100,
    parameter: Annotated[
        list[str] | None, typer.Option("--param", "-p", help="NAME=VALUE for $NAME in the query (repeatable).")
    ] = None,
    config: Config = None,
    form: AsFormat = "table",
    as_json: AsJson = False,
) -> None:
    """Query the lake in SQL: candidates, rejects, features, weights, scores, selections, evaluations, lineage."""
    with expected_failures():
        form = chosen(form, as_json)
        settings = read_settings(config)
        values = {name: value for name, _, value in (one.partition("=") for one in parameter or ())}
        from prism_assets.catalog.sql import ask, ask_batches, refreshed
        from prism_assets.engines import open_lake

        lake = open_lake(settings)
        with refreshed(lake) as connection:
            lake.confine(connection)
            if form in ("csv", "parquet"):
                with ask_batches(connection, query, values) as batches:
                    write_rows(batches, batches.schema, form)
                return
            answer = ask(connection, query, limit, values)
        if form == "json":
            print_json([dict(zip(answer.columns, row, strict=True)) for row in answer.rows])
        else:
            print_table(answer.columns, [[short(cell) for cell in row] for row in answer.rows])
        if answer.more:
            say(f"There are more than {limit} rows; --limit prints more.", fg="yellow", err=True)
