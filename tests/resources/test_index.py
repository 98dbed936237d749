"""The index: exact against numpy in float64, whatever the segments, threads or batch; damage is named."""

import numpy as np
import pytest

from prism_assets.errors import DamagedSegment
from prism_assets.resources.index import SegmentPart, VectorStore, search
from prism_assets.resources.index import store as store_module

TOLERANCE = 1e-5


def unit_rows(number: int, dim: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((number, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write(folder, rows, cuts=()):
    """`rows` cut into segments; returns the store and the paths."""
    store = VectorStore(device="cpu")
    paths = []
    for i, part in enumerate(np.split(rows, cuts)):
        paths.append(folder / f"segment-{len(cuts)}-{i}.faiss")
        store.write_segment(paths[-1], part)
    return store, paths


def positions(top, sizes):
    return np.concatenate([[0], np.cumsum(sizes)])[top.segment] + top.row


def check_exact(top, sizes, stored, query, k, allowed=None):
    """Scores within the tolerance of float64 products of the stored values; nothing better left out;
    sorted.
    """
    products = stored.astype(np.float64) @ query.astype(np.float64)
    found = positions(top, sizes)
    assert len(found) == len(set(found.tolist())) == k
    np.testing.assert_allclose(top.scores, products[found], atol=TOLERANCE, rtol=0)
    left_out = np.ones(len(stored), bool) if allowed is None else allowed.copy()
    assert left_out[found].all()
    left_out[found] = False
    assert products[left_out].max(initial=-np.inf) <= top.scores[-1] + TOLERANCE
    order = np.lexsort((top.row, top.segment, -top.scores))
    np.testing.assert_array_equal(order, np.arange(k))


@pytest.mark.parametrize("dim", [7, 64, 200])
def test_top_k_equals_a_float64_ranking_of_the_stored_values(tmp_path, dim):
    rows, queries = unit_rows(3000, dim), unit_rows(9, dim, seed=1)
    store, paths = write(tmp_path, rows, [0, 17, 1500, 2990])  # an empty segment, too
    index, stored = store.open(paths), rows.astype(np.float16)
    assert (index.sizes, index.total, index.dim) == ([0, 17, 1483, 1490, 10], 3000, dim)
    for k in (1, 150, 2999, 3000):
        check_exact(index.top_k(queries[0], k), index.sizes, stored, queries[0], k)
        for query, top in zip(queries, index.top_k_many(queries, k), strict=True):
            check_exact(top, index.sizes, stored, query, k)
    assert len(index.top_k(queries[0], 10_000).scores) == 3000
    assert len(index.top_k(queries[0], 0).scores) == 0
    np.testing.assert_allclose(
        np.concatenate(index.scores(queries[0])), stored.astype(np.float64) @ queries[0], atol=TOLERANCE
    )
    assert [len(scores) for scores in index.scores(queries[0])] == index.sizes


def test_segments_threads_and_batches_change_no_bit(tmp_path, monkeypatch):
    rows, queries = unit_rows(5000, 96), unit_rows(40, 96, seed=1)
    answers = []
    for cuts in ([], [1, 2, 700, 701, 3333]):
        store, paths = write(tmp_path, rows, cuts)
        for threads in (1, 3):
            monkeypatch.setattr(search, "_threads", lambda threads=threads: threads)
            index = store.open(paths)
            singles = [index.top_k(query, 400) for query in queries]
            for tops in (singles, index.top_k_many(queries, 400)):
                answers.append([(positions(top, index.sizes), top.scores) for top in tops])
    for answer in answers[1:]:
        for (rows_one, scores_one), (rows_other, scores_other) in zip(answers[0], answer, strict=True):
            np.testing.assert_array_equal(rows_one, rows_other)
            np.testing.assert_array_equal(scores_one, scores_other)


def test_masks_restrict_what_may_be_returned(tmp_path):
    rows, queries = unit_rows(2000, 32), unit_rows(6, 32, seed=1)
    store, paths = write(tmp_path, rows, [600, 1300])
    index, stored = store.open(paths), rows.astype(np.float16)
    best = index.top_k(queries[0], 2000)
    allowed = np.ones(2000, bool)
    allowed[positions(best, index.sizes)[:50]] = False
    allowed[600:1300] = True
    masks = [allowed[:600], None, allowed[1300:]]
    check_exact(index.top_k(queries[0], 300, masks), index.sizes, stored, queries[0], 300, allowed)
    for query, top in zip(queries, index.top_k_many(queries, 300, masks), strict=True):
        check_exact(top, index.sizes, stored, query, 300, allowed)
    few = [np.zeros(600, bool), np.zeros(700, bool), np.arange(700) < 3]
    for top in (index.top_k(queries[0], 300, few), *index.top_k_many(queries, 300, few)):
        assert sorted(top.row.tolist()) == [0, 1, 2] and set(top.segment.tolist()) == {2}
    nothing = [np.zeros(size, bool) for size in index.sizes]
    assert len(index.top_k(queries[0], 5, nothing).row) == 0
    with pytest.raises(ValueError, match="2 masks for 3 segments"):
        index.top_k(queries[0], 5, few[:2])
    with pytest.raises(ValueError, match=r"mask 1 .*segment-2-1.faiss needs bool of shape \[700\]"):
        index.top_k(queries[0], 5, [None, few[0], None])


def test_equal_scores_are_in_order_and_can_be_returned_beyond_k(tmp_path):
    rows = np.repeat(unit_rows(4, 16), 5, axis=0)  # every row five times, side by side
    store, paths = write(tmp_path, rows, [7])
    index, query = store.open(paths), rows[5].astype(np.float32)
    for top in (index.top_k(query, 3), index.top_k_many(np.stack([query] * 8), 3)[7]):
        assert list(zip(top.segment.tolist(), top.row.tolist())) == [(0, 5), (0, 6), (1, 0)]
    for top in (
        index.top_k(query, 3, with_ties=True),
        index.top_k_many(query[None].repeat(8, 0), 3, with_ties=True)[7],
    ):
        assert positions(top, index.sizes).tolist() == [5, 6, 7, 8, 9]


def test_large_scores_do_not_outrun_the_bound_that_narrows_a_batch(tmp_path):
    """Rows far from unit size: the product's rounding error grows with them, and the candidates must
    follow.
    """
    rows = 1000 * unit_rows(2000, 256)
    rows[1000:] = rows[:1000] + np.random.default_rng(3).choice([-0.5, 0.5], (1000, 256)).astype(
        np.float32
    )  # near ties
    store, paths = write(tmp_path, rows, [512])
    index, queries = store.open(paths), 100 * unit_rows(8, 256, seed=1)
    for query, top in zip(queries, index.top_k_many(queries, 700), strict=True):
        single = index.top_k(query, 700)
        np.testing.assert_array_equal(single.scores, top.scores)
        np.testing.assert_array_equal(single.row, top.row)


def test_compaction_changes_no_answer(tmp_path):
    rows, queries = unit_rows(900, 24), unit_rows(7, 24, seed=1)
    store, paths = write(tmp_path, rows, [10, 10, 400])
    before = store.open(paths)
    offsets = store.compact(paths, tmp_path / "compacted.faiss")
    assert offsets == [0, 10, 10, 400]
    after = store.open([tmp_path / "compacted.faiss"])
    for old, new in zip(before.top_k_many(queries, 100), after.top_k_many(queries, 100), strict=True):
        np.testing.assert_array_equal(np.array(offsets)[old.segment] + old.row, new.row)
        np.testing.assert_array_equal(old.scores, new.scores)
    store.write_segment(tmp_path / "whole.faiss", rows)
    assert (tmp_path / "whole.faiss").read_bytes() == (tmp_path / "compacted.faiss").read_bytes()


def test_a_segment_has_two_bytes_a_value_and_is_not_read_before_it_is_asked(tmp_path):
    rows = unit_rows(20_000, 256)
    _, (path,) = write(tmp_path, rows)
    assert rows.size * 2 <= path.stat().st_size < rows.size * 2 * 1.01
    index = VectorStore(device="cpu").open([path])
    mapped = [line for line in open("/proc/self/maps") if path.name in line]
    assert mapped, "the codes are not memory-mapped"
    assert not index._segments[0].values.flags.writeable or not index._segments[0].index.codes.is_owned


def test_rows_can_be_read_back_in_any_order(tmp_path):
    rows = unit_rows(100, 24)
    store, (first, second) = write(tmp_path, rows, [60])
    index = store.open([first, SegmentPart(second, 10, 20)])
    np.testing.assert_array_equal(index.vectors(1, np.array([19, 0, 3])), rows.astype(np.float16)[[89, 70, 73]])
    assert (
        index.vectors(0, np.array([], np.int64)).shape == (0, 24)
        and index.vectors(0, np.array([5])).dtype == np.float32
    )


def test_parts_of_a_segment_score_like_the_rows_they_are(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 16)).astype(np.float16)
    store, path = VectorStore(device="cpu"), tmp_path / "segment.faiss"
    store.write_segment(path, vectors)
    query = rng.standard_normal(16).astype(np.float32)
    index = store.open([SegmentPart(path, 30, 20), SegmentPart(path, 0, 7)])
    expected = vectors.astype(np.float64) @ query.astype(np.float64)
    first, second = index.scores(query)
    np.testing.assert_allclose(first, expected[30:], atol=1e-5)
    np.testing.assert_allclose(second, expected[:7], atol=1e-5)
    top = index.top_k(query, 3)
    rows = np.concatenate([np.arange(30, 50), np.arange(7)])
    best = rows[np.argsort(-expected[rows], kind="stable")[:3]]
    assert [
        (30 + row if segment == 0 else row) for segment, row in zip(top.segment, top.row, strict=True)
    ] == best.tolist()
    with pytest.raises(ValueError, match="no part of 21"):
        store.open([SegmentPart(path, 30, 21)])


def test_a_truncated_file_is_named_wherever_it_ends(tmp_path):
    store, (path,) = write(tmp_path, unit_rows(50, 12), [])
    whole = path.read_bytes()
    lengths = [*range(0, 140), len(whole) // 2, len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedSegment, match="materialise the index again") as caught:
            store.open([path])
        assert caught.value.path == path and str(path) in str(caught.value)
    path.write_bytes(whole)
    assert store.open([path]).total == 50


def test_foreign_files_are_named(tmp_path):
    import faiss

    store = VectorStore(device="cpu")
    text = tmp_path / "notes.txt"
    text.write_text("not an index")
    with pytest.raises(DamagedSegment, match="notes.txt: is no segment: it starts with b'not '"):
        store.open([text])
    with pytest.raises(DamagedSegment, match="missing.faiss: cannot be read .No such file"):
        store.open([tmp_path / "missing.faiss"])
    for name, index in [
        ("euclidean", faiss.IndexScalarQuantizer(8, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2)),
        (
            "bytes",
            faiss.IndexScalarQuantizer(8, faiss.ScalarQuantizer.QT_8bit_direct, faiss.METRIC_INNER_PRODUCT),
        ),
        ("flat", faiss.IndexFlatL2(8)),
        ("float", faiss.IndexFlatIP(8)),
    ]:
        index.add(unit_rows(5, 8))
        faiss.write_index(index, str(tmp_path / name))
        with pytest.raises(DamagedSegment, match=f"{name}: is"):
            store.open([tmp_path / name])


def test_segments_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    store = VectorStore(device="cpu")

    def full_disk(index, path):
        with open(path, "wb") as file:
            file.write(b"IxSQ")
        raise RuntimeError("write error: No space left on device")

    monkeypatch.setattr("faiss.write_index", full_disk)
    with pytest.raises(
        OSError, match="segment.faiss: the segment of 5 rows .80 bytes. could not be written: .*No space"
    ):
        store.write_segment(tmp_path / "segment.faiss", unit_rows(5, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value, cause", [(np.nan, "not finite"), (np.inf, "not finite"), (1e6, "exceeds the range of float16")]
)
def test_rows_that_are_not_finite_are_refused_by_number(tmp_path, value, cause):
    rows = unit_rows(9, 8)
    rows[[4, 6], 3] = value
    with pytest.raises(ValueError, match=f"row 4 .*{cause} .2 such rows of 9"):
        VectorStore(device="cpu").write_segment(tmp_path / "segment.faiss", rows)
    assert list(tmp_path.iterdir()) == []


def test_input_of_the_wrong_shape_or_kind_is_refused(tmp_path):
    store, (path, *_) = write(tmp_path, unit_rows(20, 8), [5])
    index = store.open([path])
    with pytest.raises(ValueError, match=r"\[q, d\]"):
        index.top_k_many(np.ones(8), 3)
    with pytest.raises(ValueError, match="shape .9. do not fit an index of d = 8"):
        index.top_k(np.ones(9), 3)
    with pytest.raises(ValueError, match="query 1 has a value that is not finite"):
        index.top_k_many(np.array([[1.0] * 8, [np.nan] * 8]), 3)
    with pytest.raises(ValueError, match="k is -1"):
        index.top_k(np.ones(8), -1)
    with pytest.raises(ValueError, match="int64 of shape"):
        store.write_segment(tmp_path / "x", np.ones((3, 8), np.int64))
    store.write_segment(tmp_path / "other.faiss", unit_rows(3, 9))
    with pytest.raises(ValueError, match="different dimensions.*other.faiss has 9"):
        store.open([path, tmp_path / "other.faiss"])


def test_the_form_of_the_rows_is_a_part_of_an_artefact_s_identity_and_no_setting():
    assert VectorStore().storage == "float16"
    with pytest.raises(TypeError, match="storage"):
        VectorStore(storage="float32")


def test_no_segments_at_all():
    index = VectorStore(device="cpu").open([])
    assert (index.total, index.dim, index.scores(np.ones(4))) == (0, None, [])
    assert len(index.top_k(np.ones(4), 5).row) == 0 and len(index.top_k_many(np.ones((2, 4)), 5)) == 2


def test_asking_for_cuda_where_there_is_none_is_an_error(monkeypatch):
    monkeypatch.setattr(store_module, "_cuda_found", lambda: False)
    with pytest.raises(RuntimeError, match="device is cuda, but torch finds no CUDA device here; set device: cpu"):
        VectorStore(device="cuda").open([])
    assert VectorStore(device="auto").open([])._device == "cpu"
    with pytest.raises(ValueError, match="device is 'tpu'"):
        VectorStore(device="tpu").open([])


class FaissOnAGpu:
    """Stands for `GpuIndexFlatIP`: FAISS's products of the same rows, computed on the CPU, and its limit on k."""

    def __init__(self, rows):
        import faiss

        self.index = faiss.IndexFlatIP(rows.shape[1])
        self.index.add(rows.astype(np.float16).astype(np.float32))
        self.asked = []

    def search(self, queries, k):
        assert k <= 2048
        self.asked.append(k)
        return self.index.search(queries, k)


def with_faiss_on_a_gpu(folder, rows):
    store, paths = write(folder, rows, [len(rows) // 3])
    index = store.open(paths)
    index.__dict__["_faiss_gpu_index"] = stand_in = FaissOnAGpu(rows)  # in the place of the cached property
    return index, stand_in


def test_budgets_within_its_limit_are_asked_of_faiss_on_a_gpu_and_others_of_the_torch_path(tmp_path):
    rows, queries = unit_rows(3000, 64), unit_rows(9, 64, seed=1)
    index, stand_in = with_faiss_on_a_gpu(tmp_path, rows)
    largest = search.GPU_FAISS_MAX_K - search.GPU_FAISS_SPARE
    for k, by_faiss in ((1, True), (150, True), (largest, True), (largest + 1, False), (3000, False)):
        stand_in.asked.clear()
        for query, top in zip(queries, index.top_k_many(queries, k), strict=True):
            check_exact(top, index.sizes, rows.astype(np.float16), query, k)
            for found, scanned in zip(top, index.top_k(query, k), strict=True):
                np.testing.assert_array_equal(found, scanned)
        assert bool(stand_in.asked) == by_faiss, k
    stand_in.asked.clear()
    index.top_k_many(queries, 5, [np.ones(1000, bool), np.arange(2000) % 2 == 0])
    assert not stand_in.asked  # it knows no masks


def test_near_ties_at_the_cut_are_not_left_to_faiss_on_a_gpu(tmp_path):
    rows = np.repeat(unit_rows(5, 64), 300, axis=0)  # more equal rows than it is asked for beyond k
    index, stand_in = with_faiss_on_a_gpu(tmp_path, rows)
    queries = unit_rows(4, 64, seed=1)
    for query, top in zip(queries, index.top_k_many(queries, 100, with_ties=True), strict=True):
        assert len(top.scores) == 300
        check_exact(top, index.sizes, rows.astype(np.float16), query, 300)
    assert stand_in.asked == [164]


def test_settings_of_torch_survive_a_batch(tmp_path):
    import torch

    store, paths = write(tmp_path, unit_rows(3000, 16), [1000])
    before = torch.get_num_threads()
    torch.set_float32_matmul_precision("medium")
    try:
        store.open(paths).top_k_many(unit_rows(8, 16, seed=1), 10)
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (before, "medium")
    finally:
        torch.set_float32_matmul_precision("highest")
