"""`prism sql`: friendly views over the lake, checked against the artefacts read one by one."""

import json
import math

import duckdb
import numpy as np
import pytest
from typer.testing import CliRunner

from prism_assets.catalog import views as catalog
from prism_assets.catalog.sql import ask, connect, refresh
from prism_assets.catalog.views import VIEWS, additions
from prism_assets.errors import QueryRefused
from prism_assets.features.blocks import read_blocks, vectors_of
from prism_assets.resources.lake.lake import Lake
from prism_assets.resources.lake.views import CatalogAdditions

# Tables that this project does not fill; they are tested with what makes them.
ELSEWHERE = {"trials", "experiments", "benchmarks", "removed"}


@pytest.fixture(scope="module")
def lake(two_versions):
    return two_versions.lake


@pytest.fixture(scope="module")
def connection(lake):
    with connect(lake) as opened:
        yield opened


def current_version(lake):
    return max(lake.heads("candidate_index"), key=lambda head: head["time"])["scope"]


def columns_of(connection, view):
    return [row[0] for row in connection.execute(f'DESCRIBE main."{view}"').fetchall()]


def test_every_view_has_the_same_columns_in_an_empty_lake(connection, tmp_path):
    with connect(Lake(root=str(tmp_path / "nothing"))) as empty:
        for view in VIEWS:
            assert empty.execute(f'SELECT * FROM "{view}"').fetchall() == []
            full = connection.execute(f'DESCRIBE "{view}"').fetchall()
            assert [row[:2] for row in empty.execute(f'DESCRIBE "{view}"').fetchall()] == [row[:2] for row in full]
        for table in ("artifacts", "heads", "lineage"):
            assert empty.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_the_declared_columns_are_those_of_the_artefacts(lake):
    tables = {name: columns for name, columns in additions().columns.items() if name not in ELSEWHERE}
    for table, declared in tables.items():
        stored = lake.read_table(lake.get(table, lake.heads(table)[0]["fingerprint"])).column_names
        assert set(declared) <= set(stored), table
    with lake.connect(CatalogAdditions(additions().columns)) as typed, lake.connect() as plain:
        for table, declared in tables.items():
            kinds = dict(row[:2] for row in plain.execute(f"DESCRIBE raw.{table}").fetchall())
            stubbed = dict(row[:2] for row in typed.execute(f"DESCRIBE raw.{table}").fetchall())
            for column in declared:
                assert stubbed[column] == kinds[column] or kinds[column] == '"NULL"', (table, column)


def test_candidates_know_why_they_do_not_count(connection, lake):
    rows = connection.execute("SELECT shard, row, id, status FROM candidates").fetchall()
    pool = lake.get("live_pool", lake.heads("live_pool")[0]["fingerprint"])
    expected = set()
    for manifest in lake.read_table(pool).to_pylist():
        table = lake.read_table(lake.get("candidates", manifest["candidates_fingerprint"]), ["id"])
        reasons = dict(zip(manifest["excluded_rows"], manifest["excluded_reasons"], strict=True))
        for position, name in enumerate(table["id"].to_pylist()):
            expected.add((manifest["shard"], position, name, reasons.get(position, "canonical")))
    assert set(rows) == expected and len(rows) == len(expected)
    assert sorted(status for *_, status in rows if status != "canonical") == ["contamination", "duplicate"]


def test_a_shard_that_left_the_pool_is_retired(two_versions, tmp_path):
    project = two_versions.copy(tmp_path / "copy")
    lake = project.lake
    for head in lake.heads("live_pool"):
        lake.retire("live_pool", head["partition"], head["scope"])
    with connect(lake) as opened:
        assert opened.execute("SELECT DISTINCT status FROM candidates").fetchall() == [("retired",)]


def test_rejects_name_file_line_and_reason(connection):
    rows = connection.execute("SELECT kind, name, line, reason FROM rejects").fetchall()
    assert len(rows) == 1
    kind, name, line, reason = rows[0]
    assert (kind, line) == ("candidates", 21) and name.startswith("shard1-") and "JSON" in reason


def test_features_are_those_of_the_blocks_in_the_order_of_the_shard(connection, lake):
    version = current_version(lake)
    for head in lake.heads("candidate_features"):
        if head["scope"] != version:
            continue
        stored = read_blocks(lake, lake.get("candidate_features", head["fingerprint"]), ["id", "vector", "norm"])
        rows = connection.execute(
            "SELECT row, id, vector, norm FROM features WHERE shard = ? AND version = ? ORDER BY row",
            [head["partition"], version],
        ).fetchall()
        assert [row[0] for row in rows] == list(range(stored.num_rows))
        assert [row[1] for row in rows] == stored["id"].to_pylist()
        assert np.array_equal(np.array([row[2] for row in rows], np.float16), vectors_of(stored))
        assert [row[3] for row in rows] == stored["norm"].to_pylist()


def test_rows_of_the_second_block_go_on_where_the_first_ended(tmp_path):
    import pyarrow as pa

    from prism_assets.resources.lake.recipe import Recipe

    lake = Lake(root=str(tmp_path))
    blocks = []
    for number, rows in enumerate((["a", "b", "c"], ["d", "e"])):
        table = pa.table({"id": rows, "vector": [[1.0]] * len(rows), "refused": pa.nulls(len(rows), pa.string())})
        blocks.append(lake.publish_table(Recipe("feature_blocks", 1, {"n": number}, version="v"), table))
        lake.point(blocks[-1], blocks[-1].fingerprint, "v")
    listed = pa.table({"block": [one.fingerprint for one in blocks], "rows": [3, 2], "refused": [0, 0]})
    lake.point(lake.publish_table(Recipe("candidate_features", 1), listed), "shard", "v")
    with connect(lake) as opened:
        found = opened.execute("SELECT row, id FROM features ORDER BY row").fetchall()
    assert found == [(0, "a"), (1, "b"), (2, "c"), (3, "d"), (4, "e")]


def test_vectors_can_be_multiplied(connection, lake):
    version = current_version(lake)
    dim = connection.execute("SELECT len(vector) FROM features WHERE version = ? LIMIT 1", [version]).fetchone()[0]
    assert dim == 2 * 64  # two checkpoints
    rows = connection.execute(
        "SELECT one.id, other.id, list_dot_product(one.vector, other.vector), "
        f"array_inner_product(one.vector::FLOAT[{dim}], other.vector::FLOAT[{dim}]), one.vector, other.vector "
        "FROM features one JOIN features other USING (version) WHERE version = ? AND one.row < 3",
        [version],
    ).fetchall()
    assert len(rows) == 6 * 40  # three rows of each of two shards, with all rows
    left, right = (np.array([row[i] for row in rows], np.float64) for i in (4, 5))
    expected = (left * right).sum(axis=1)
    assert np.abs(expected).max() > 0.5
    for column in (2, 3):
        np.testing.assert_allclose([row[column] for row in rows], expected, atol=1e-5)


def test_a_direction_multiplied_in_sql_gives_the_scores_of_the_selection(connection, lake):
    version = current_version(lake)
    query = lake.read_tensors(lake.head("target_directions", "plain", f"{version}/prism"))["query"].tolist()
    rows = connection.execute(
        "SELECT s.score, list_dot_product(f.vector, $query::FLOAT[]) FROM scores s "
        "JOIN features f ON f.shard = s.shard AND f.row = s.row AND f.version = $version "
        "WHERE s.target = 'plain' AND s.strategy = 'prism'",
        {"query": query, "version": version},
    ).fetchall()
    assert len(rows) == 8
    np.testing.assert_allclose([row[0] for row in rows], [row[1] for row in rows], atol=1e-5)


def test_weights_are_long_and_sum_to_one(connection, lake):
    rows = connection.execute(
        "SELECT target, strategy, count(*), sum(weight) FROM weights WHERE version = ? GROUP BY ALL",
        [current_version(lake)],
    ).fetchall()
    assert {row[:3] for row in rows} == {
        *(("plain", name, 6) for name in ("prism", "uniform", "less")),
        *(("pairs", name, 4) for name in ("prism", "uniform", "less")),
    }
    assert all(math.isclose(row[3], 1) for row in rows)
    weight = lake.read_table(lake.head("target_weights", "plain", current_version(lake))).to_pylist()[0]
    found = connection.execute(
        "SELECT weight FROM weights WHERE target = 'plain' AND strategy = 'prism' AND id = ? AND version = ?",
        [weight["id"], current_version(lake)],
    ).fetchall()
    assert found == [(weight["prism"],)]


def test_scores_and_selections_name_target_and_strategy(connection, lake):
    for target in ("plain", "pairs"):
        for strategy in ("prism", "random"):
            selection = lake.require("selection", f"{strategy}|{target}")
            stored = lake.read_table(selection, ["rank", "id", "score"]).to_pylist()
            found = connection.execute(
                "SELECT rank, id, score FROM scores WHERE target = ? AND strategy = ? ORDER BY rank",
                [target, strategy],
            ).fetchall()
            assert found == [(row["rank"], row["id"], row["score"]) for row in stored]
            current = connection.execute(
                "SELECT fingerprint, rows, pool_rows FROM selections WHERE target = ? AND strategy = ? AND current",
                [target, strategy],
            ).fetchall()
            assert current == [(selection.fingerprint, 8, selection.notes["pool_rows"])]


def test_selections_of_the_earlier_version_are_listed(connection, lake):
    versions = {head["scope"] for head in lake.heads("candidate_index")}
    rows = connection.execute(
        "SELECT version, current FROM selections WHERE target = 'plain' AND strategy = 'prism'"
    ).fetchall()
    assert dict(rows) == {version: version == current_version(lake) for version in versions}


def test_evaluations_are_one_row_a_seed(connection, lake):
    rows = connection.execute("SELECT target, strategy, seed, mean_log_prob, records FROM evaluations").fetchall()
    expected = set()
    for head in lake.heads("evaluations"):
        notes = lake.get("evaluations", head["fingerprint"]).notes
        name, _, seed = head["partition"].partition("/seed-")
        strategy, target = name.split("|")
        seed = int(seed) if seed else None
        expected.add((target, strategy, seed, notes["mean_log_prob"], notes["records"]))
    assert set(rows) == expected and len(rows) == len(expected)
    assert {row[:3] for row in rows} >= {("plain", "base", None), ("pairs", "prism", 0)}
    means = connection.execute(
        "SELECT target, strategy, seed, avg(mean_log_prob) FROM evaluation_records GROUP BY ALL"
    ).fetchall()
    for row in rows:
        assert any(mean[:3] == row[:3] and math.isclose(mean[3], row[3]) for mean in means)


def test_artifacts_and_lineage_join(connection, lake):
    selection = lake.require("selection", "prism|plain")
    rows = connection.execute(
        "SELECT role, input_fingerprint FROM lineage WHERE fingerprint = ?", [selection.fingerprint]
    ).fetchall()
    assert dict(rows) == {role: one["fingerprint"] for role, one in selection.header["inputs"].items()}
    strategy = connection.execute(
        "SELECT settings->>'strategy' FROM artifacts WHERE fingerprint = ?", [selection.fingerprint]
    ).fetchone()
    assert strategy == ("prism",)


# -- asking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [
        "DROP VIEW features",
        "CREATE TABLE x AS SELECT 1",
        "INSERT INTO heads SELECT * FROM heads",
        "COPY (SELECT 1) TO '{there}'",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{there}'",
        "EXPORT DATABASE '{there}'",
        "ATTACH '{there}'",
        "SET threads = 1",
        "SELECT 1; COPY (SELECT 1) TO '{there}'",
        "",
    ],
)
def test_only_reading_is_possible(connection, tmp_path, query):
    there = tmp_path / "written"
    with pytest.raises(QueryRefused):
        ask(connection, query.format(there=there))
    assert not there.exists()
    assert connection.execute("SELECT count(*) FROM features").fetchone()[0] > 0


@pytest.mark.parametrize(
    "query", ["SELEC 1", "SELECT nothing FROM candidates", "SELECT * FROM nowhere", "SELECT 'open"]
)
def test_what_duckdb_does_not_understand_is_refused_with_its_reason(connection, query):
    with pytest.raises(QueryRefused, match="DuckDB: .*(Error|error)"):
        ask(connection, query)


def test_parameters_carry_any_quotes(connection):
    answer = ask(
        connection, "SELECT id, record_id FROM candidates WHERE record_id = $name", parameters={"name": "it's-3"}
    )
    assert len(answer.rows) == 1 and answer.rows[0][1] == "it's-3"
    injected = "x' OR '1'='1"
    assert ask(connection, "SELECT id FROM candidates WHERE id = $name", parameters={"name": injected}).rows == []


def test_a_limit_says_that_there_is_more(connection):
    cut = ask(connection, "SELECT id FROM candidates ORDER BY id", limit=5)
    everything = ask(connection, "SELECT id FROM candidates ORDER BY id")
    assert cut.more and not everything.more
    assert cut.rows == everything.rows[:5] and len(everything.rows) == 40
    exact = ask(connection, "SELECT id FROM candidates", limit=40)
    assert len(exact.rows) == 40 and not exact.more
    assert ask(connection, "DESCRIBE candidates").rows and ask(connection, "SHOW ALL TABLES").rows


def test_a_lake_in_a_folder_with_quotes_can_be_read(two_versions, tmp_path):
    project = two_versions.copy(tmp_path / 'it\'s "here"')
    with connect(project.lake) as opened:
        assert opened.execute("SELECT count(*) FROM candidates").fetchone() == (40,)


def test_an_open_reader_does_not_keep_the_catalogue_from_being_renewed(two_versions, tmp_path):
    project = two_versions.copy(tmp_path / "copy")
    lake = project.lake
    path = refresh(lake)
    with duckdb.connect(str(path), read_only=True) as reader:
        assert reader.execute("SELECT count(*) FROM candidates").fetchone() == (40,)
        lake.retire("candidates", *(lake.heads("candidates")[0][name] for name in ("partition", "scope")))
        refresh(lake)
        assert reader.execute("SELECT count(*) FROM candidates").fetchone() == (40,)  # what it opened
    with duckdb.connect(str(path), read_only=True) as reader:
        assert reader.execute("SELECT count(*) FROM candidates").fetchone() == (20,)
    assert not list(lake.folder.glob("unpublished/*"))


def test_deleting_the_catalogue_loses_nothing(two_versions, tmp_path):
    lake = two_versions.copy(tmp_path / "copy").lake
    lake.catalog_path.unlink()
    path = refresh(lake)
    with duckdb.connect(str(path), read_only=True) as reader:
        assert {row[0] for row in reader.execute("SELECT DISTINCT strategy FROM selections").fetchall()} == {
            *("prism", "uniform", "less", "random")
        }


# -- the command -------------------------------------------------------------------------------------------------


def prism(project, *arguments):
    from prism_assets.cli import app

    return CliRunner().invoke(app, [*arguments, "--config", str(project.config)])


def test_the_command_prints_strict_json(two_versions):
    query = (
        "SELECT strategy, count(*) AS n, 'nan'::DOUBLE AS hole FROM scores WHERE target = $t GROUP BY ALL ORDER BY ALL"
    )
    result = prism(two_versions, "sql", query, "--param", "t=plain", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == [
        {"strategy": name, "n": 8, "hole": None} for name in ("less", "prism", "random", "uniform")
    ]


def test_the_command_reads_nothing_beside_the_lake(two_versions, tmp_path):
    outside = tmp_path / "secret.csv"
    outside.write_text("a,b\n1,2\n")
    with duckdb.connect() as connection:  # not the one that all of this process share
        connection.sql("SELECT 1 AS x").write_parquet(str(tmp_path / "other.parquet"))
    up = two_versions.lake.folder / "artifacts" / ".." / ".." / "prism.yaml"
    for table in (
        f"'{outside}'",
        f"read_text('{outside}')",
        f"'{tmp_path}/other.parquet'",
        f"read_text('{up}')",
        "glob('/*')",
    ):
        refused = prism(two_versions, "sql", f"SELECT * FROM {table}")
        assert refused.exit_code == 2 and "Permission Error" in refused.output, table
    for view in catalog.VIEWS:
        answer = prism(two_versions, "sql", f'SELECT count(*) AS n FROM "{view}"', "--json")
        assert answer.exit_code == 0 and (json.loads(answer.stdout)[0]["n"] > 0) == (view not in ELSEWHERE), view


def test_the_command_prints_a_table_and_its_statuses(two_versions):
    shown = prism(two_versions, "sql", "SELECT '[/b] bracket' AS text, id FROM candidates", "--limit", "2")
    assert shown.exit_code == 0 and "[/b] bracket" in shown.output and "more than 2 rows" in shown.output
    assert prism(two_versions, "sql", "DROP VIEW heads").exit_code == 2
    assert prism(two_versions, "sql", "SELECT nothing").exit_code == 2


def test_a_run_leaves_a_catalogue_with_the_views(two_versions):
    with duckdb.connect(str(two_versions.lake.catalog_path), read_only=True) as reader:
        names = {row[0] for row in reader.execute("SELECT table_name FROM information_schema.tables").fetchall()}
    assert names >= {*catalog.VIEWS, "artifacts", "heads", "lineage"}
