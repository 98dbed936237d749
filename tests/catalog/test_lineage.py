"""`prism lineage`: the chain above an artefact, read from the lake alone."""

import json
import shutil
from types import SimpleNamespace

import pytest
from rich.console import Console

from prism_assets.catalog.lineage import find_artifact, trace
from prism_assets.catalog.tree import draw
from prism_assets.errors import UnknownThing
from prism_assets.resources.lake.lake import Lake
from prism_assets.resources.lake.recipe import Recipe


@pytest.fixture
def lake(two_versions):
    return two_versions.lake


def text_of(tree) -> str:
    console = Console(width=400, record=True, file=open("/dev/null", "w"))
    console.print(tree)
    return console.export_text()


def by_fingerprint(traced):
    return {one["fingerprint"]: one for one in traced["artifacts"]}


def test_an_adapter_is_traced_to_the_files_it_came_from(lake, two_versions):
    traced = trace(lake, find_artifact(lake, "adapter[prism|plain]"))
    tables = {one["table"] for one in traced["artifacts"]}
    assert tables >= {
        *("adapters", "selection", "candidate_index", "index_segments", "candidate_features", "feature_blocks"),
        *("target_directions", "target_features", "warmup_checkpoints", "warmup_sample", "live_pool", "candidates"),
    }
    from prism_assets.resources.lake.hashing import hash_file

    files = {edge["content_hash"] for one in traced["artifacts"] for edge in one["inputs"] if edge["role"] == "file"}
    folder = two_versions.folder
    expected = [*two_versions.inbox.glob("*.jsonl"), *folder.glob("plain/*.jsonl"), *folder.glob("pairs/*.jsonl")]
    assert files == {hash_file(path) for path in expected}


def test_every_artefact_carries_what_its_own_header_says(lake):
    traced = trace(lake, find_artifact(lake, "report[plain]"))
    assert traced["artifacts"][0]["table"] == "report"
    for one in traced["artifacts"]:
        header = lake.get(one["table"], one["fingerprint"]).header
        assert {name: one[name] for name in ("settings", "stage_version", "created", "run_id")} == {
            name: header[name] for name in ("settings", "stage_version", "created", "run_id")
        }
        assert one["run_id"]
    assert json.loads(json.dumps(traced)) == traced


def test_blocks_that_only_rows_name_are_in_the_chain(lake):
    features = find_artifact(lake, lake.heads("candidate_features")[0]["fingerprint"])
    blocks = lake.read_table(features, ["block"])["block"].to_pylist()
    assert set(blocks) <= set(by_fingerprint(trace(lake, features)))


def test_the_edge_that_does_not_define_the_identity_is_marked(lake):
    adapter = find_artifact(lake, "adapters[prism|plain/seed-0]")
    traced = trace(lake, adapter)
    edges = {edge["role"]: edge for edge in by_fingerprint(traced)[adapter.fingerprint]["inputs"]}
    assert edges["selection"]["defines"] is False
    assert edges["rows"]["defines"] is True and edges["rows"]["table"] is None
    marked = [line for line in text_of(draw(traced)).splitlines() if "no part of the identity" in line]
    assert len(marked) == 1 and "selection[prism|plain]" in marked[0]


def test_a_shared_input_is_drawn_once_and_then_named(lake):
    traced = trace(lake, find_artifact(lake, "selection[prism|plain]"))
    drawing = text_of(draw(traced)).splitlines()
    warmup = next(one for one in traced["artifacts"] if one["table"] == "warmup_checkpoints")["fingerprint"][:12]
    lines = [line for line in drawing if warmup in line]
    assert len(lines) > 1
    assert "(drawn above)" not in lines[0] and all("(drawn above)" in line for line in lines[1:])
    sample = [line for line in drawing if "warmup_sample" in line]
    assert len(sample) == 1  # what is above a shared artefact is not drawn again


def test_one_artefact_shown_under_two_names_says_so(lake):
    # `random` knows no target, so both targets show the same selection.
    one, other = find_artifact(lake, "selection[random|plain]"), find_artifact(lake, "selection[random|pairs]")
    assert one.fingerprint == other.fingerprint
    traced = by_fingerprint(trace(lake, one))[one.fingerprint]
    assert traced["shown_as"] == ["selection[random|pairs]", "selection[random|plain]"]


@pytest.mark.parametrize("spelling", ["fingerprint", "prefix", "capitals", "parquet", "jsonl", "partition"])
def test_a_thing_is_found_by(lake, spelling):
    selection = lake.require("selection", "prism|plain")
    names = {
        "fingerprint": selection.fingerprint,
        "prefix": selection.fingerprint[:10],
        "capitals": selection.fingerprint.upper(),
        "parquet": str(lake.local(selection)),
        "jsonl": str(lake.local(selection, suffix=".jsonl")),
        "partition": "selection[prism|plain]",
    }
    assert find_artifact(lake, names[spelling]).fingerprint == selection.fingerprint


def test_a_file_inside_a_folder_artefact_and_a_shard_key_are_found(lake):
    adapter = lake.require("adapters", "prism|plain/seed-0")
    weights = lake.local(adapter, "adapter_model.safetensors")
    assert find_artifact(lake, str(weights)).fingerprint == adapter.fingerprint
    head = lake.heads("candidates")[0]
    assert find_artifact(lake, head["partition"]).fingerprint == head["fingerprint"]


def test_an_ambiguous_name_lists_what_it_may_be(lake):
    with pytest.raises(UnknownThing) as error:
        find_artifact(lake, "target_direction[plain]")
    heads = [h for h in lake.heads("target_directions") if h["partition"] == "plain"]
    assert len(heads) == 6  # three strategies in two versions
    for head in heads:
        assert head["fingerprint"] in str(error.value) and head["scope"].split("/")[0] in str(error.value)


def test_a_prefix_of_two_fingerprints_is_ambiguous(tmp_path):
    import pyarrow as pa

    seen: dict[str, Recipe] = {}
    for number in range(10_000):
        recipe = Recipe("part", 1, {"n": number})
        if (prefix := recipe.fingerprint[:4]) in seen:
            break
        seen[prefix] = recipe
    lake = Lake(root=str(tmp_path))
    both = [lake.publish_table(one, pa.table({"x": [1]})) for one in (seen[prefix], recipe)]
    with pytest.raises(UnknownThing, match="may be any of these") as error:
        find_artifact(lake, prefix)
    assert all(one.fingerprint in str(error.value) for one in both)


@pytest.mark.parametrize(
    "thing", ["selection[prism|plane]", "nothing", "", "deadbeefdeadbeef", "../../etc", "a\0b", "~nobody/x"]
)
def test_an_unknown_thing_is_refused_with_advice(lake, thing):
    with pytest.raises(UnknownThing, match="similar names"):
        find_artifact(lake, thing)


def test_near_names_are_offered(lake):
    with pytest.raises(UnknownThing, match=r"selection\[prism\|plain\]"):
        find_artifact(lake, "selection[prism|plane]")


def test_an_empty_lake_says_that_it_is_empty(tmp_path):
    with pytest.raises(UnknownThing, match="is empty"):
        find_artifact(Lake(root=str(tmp_path / "lake")), "selection[prism|plain]")


def test_a_removed_input_is_shown_as_missing(two_versions, tmp_path):
    lake = two_versions.copy(tmp_path / "copy").lake
    selection = lake.require("selection", "prism|plain")
    index = selection.header["inputs"]["index"]["fingerprint"]
    lake.local(lake.get("candidate_index", index)).unlink()
    traced = trace(lake, selection)
    edge = next(edge for edge in by_fingerprint(traced)[selection.fingerprint]["inputs"] if edge["role"] == "index")
    assert edge["missing"] and edge["fingerprint"] == index
    line = next(line for line in text_of(draw(traced)).splitlines() if index[:12] in line)
    assert "no longer in the lake" in line


def test_it_works_from_the_lake_alone(two_versions, tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    shutil.copytree(two_versions.lake.folder, folder, ignore=shutil.ignore_patterns("dagster", "cache", "*.duckdb"))
    import dagster as dg

    def forbidden(*_, **__):
        raise AssertionError("lineage asked for a Dagster instance")

    monkeypatch.setattr(dg.DagsterInstance, "get", forbidden)
    lake = Lake(root=str(folder))
    traced = trace(lake, find_artifact(lake, "evaluation[prism|plain]"))
    assert {"selection", "candidates"} <= {one["table"] for one in traced["artifacts"]}


def test_a_chain_that_bites_its_tail_ends(tmp_path, monkeypatch):
    import pyarrow as pa

    from prism_assets.catalog import lineage

    lake = Lake(root=str(tmp_path))
    below = lake.publish_table(Recipe("a", 1), pa.table({"x": [1]}))
    above = lake.publish_table(Recipe("b", 1, inputs={"below": below}), pa.table({"x": [2]}))
    back = SimpleNamespace(role="back", table="b", fingerprint=above.fingerprint, content_hash="", defines=True)
    true_references = lineage.all_references
    monkeypatch.setattr(
        lineage,
        "all_references",
        lambda lake, one: [lineage.Reference(**vars(back))] if one.table == "a" else true_references(lake, one),
    )
    traced = trace(lake, above)
    assert [one["table"] for one in traced["artifacts"]] == ["b", "a"]
    assert "(drawn above)" in text_of(draw(traced))


def test_a_long_list_is_cut_in_the_drawing_but_not_in_the_data(tmp_path):
    import pyarrow as pa

    lake = Lake(root=str(tmp_path))
    parts = [lake.publish_table(Recipe("part", 1, {"n": n}), pa.table({"x": [n]})) for n in range(30)]
    whole = lake.publish_table(Recipe("whole", 1, inputs={"parts": parts}), pa.table({"x": [0]}))
    traced = trace(lake, whole)
    assert len(traced["artifacts"]) == 31
    assert "parts: 22 more" in text_of(draw(traced))
    complete = text_of(draw(traced, everything=True))
    assert all(part.fingerprint[:12] in complete for part in parts)
