"""Baselines: perplexity, BM25, hidden states and diversity, each against a slow computation of the same from its
formula."""

import itertools
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from test_strategies import FakePool

from prism_assets.selection.strategies import STRATEGIES
from prism_assets.selection.strategies.base import Texts
from prism_assets.selection.strategies.bm25 import lexical_scores, min_max
from prism_assets.selection.strategies.perplexity import percentiles


def order_of(name, pool):
    """Ids in the strategy's order."""
    return [pool.ids[row] for row in STRATEGIES[name].rank(pool).order]


# -- perplexity --------------------------------------------------------------------------------------------------


def test_a_percentile_is_the_share_below_plus_half_of_the_equals():
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(size=101), 1)  # with ties
    expected = [np.mean(values < one) + np.mean(values == one) / 2 for one in values]
    np.testing.assert_allclose(percentiles(values), expected, rtol=1e-12)


def test_perplexity_takes_the_middle_of_the_pool_first_and_the_extremes_last():
    log_probs = np.random.default_rng(1).normal(-2, 1, 31)
    ids = [f"{number:02d}" for number in range(31)]
    found = order_of("perplexity", FakePool(ids=ids, mean_log_probs=log_probs))
    by_perplexity = sorted(ids, key=lambda one: math.exp(-log_probs[int(one)]))
    assert found[0] == by_perplexity[15] and set(found[:11]) == set(by_perplexity[10:21])
    assert set(found[-2:]) == {by_perplexity[0], by_perplexity[-1]}


def test_equal_perplexities_are_ordered_by_id_whatever_the_order_of_arrival():
    rows = [("d", -1.0), ("b", -1.0), ("c", -1.0), ("a", -3.0), ("e", -0.1)]
    orders = set()
    for shuffled in itertools.permutations(rows):
        ids, log_probs = zip(*shuffled, strict=True)
        orders.add(tuple(order_of("perplexity", FakePool(ids=list(ids), mean_log_probs=np.array(log_probs)))))
    assert orders == {("b", "c", "d", "a", "e")}


# -- BM25 --------------------------------------------------------------------------------------------------------

DOCUMENTS = [
    "What is 2 + 2?\nFour, because two and two are four.",
    "Reverse the word abc.\ncba",
    "Name a river in France.\nThe Seine, a river.",
    "Name a river.\nThe Rhine is a river; a river in Germany.",
    "¿Qué es π?\nEs 3.14159, un número.",
    "++\n!!",
]
QUERIES = ["Name the longest river: a river of rivers", "what is 2", "π π?", "unheard-of", "??"]


def slow_bm25(documents, query, k1=1.5, b=0.75):
    """The formula, word by word."""
    bags = [re.findall(r"\w+", text.lower()) for text in documents]
    mean = sum(map(len, bags)) / len(bags)
    scores = []
    for bag in bags:
        counts, score = Counter(bag), 0.0
        for word in re.findall(r"\w+", query.lower()):
            having = sum(word in other for other in bags)
            idf = math.log(1 + (len(bags) - having + 0.5) / (having + 0.5))
            score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(bag) / mean))
        scores.append(score)
    return scores


def test_bm25_is_that_of_the_formula():
    found = lexical_scores(DOCUMENTS, QUERIES)
    expected = np.array([slow_bm25(DOCUMENTS, query) for query in QUERIES]).T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert found[3, 0] > found[2, 0] > found[0, 0] == 0
    assert (found[:, 3:] == 0).all()  # a word that nobody has, and no word at all


def test_documents_without_a_single_word_match_nothing():
    assert (lexical_scores(["++", "?"], ["what?", "??"]) == 0).all()


def test_bm25_lets_each_target_count_alike_however_long_its_prompt():
    """The long prompt's raw scores are many times those of the short one; scaled, the row that serves both wins."""
    prompts, completions = ["alpha beta gamma delta epsilon"] * 2 + ["zeta", "nothing"], ["one", "zeta", "two", "three"]
    pool = FakePool(
        ids=["long", "both", "short", "neither"],
        texts=Texts(prompts, completions),
        target_texts=Texts(["alpha beta gamma delta epsilon " * 4, "zeta"], ["", ""]),
    )
    ranking = STRATEGIES["bm25"].rank(pool)
    assert order_of("bm25", pool)[0] == "both" and order_of("bm25", pool)[-1] == "neither"
    documents = [f"{p} {c}" for p, c in zip(prompts, completions, strict=True)]
    columns = [np.array(slow_bm25(documents, query)) for query in pool.target_texts().prompts]
    scaled = np.mean([(one - one.min()) / (one.max() - one.min()) for one in columns], axis=0)
    np.testing.assert_allclose(ranking.scores, scaled[ranking.order], rtol=1e-5)


def test_scaling_leaves_no_nan_where_all_scores_are_equal():
    np.testing.assert_array_equal(min_max(np.array([[2.0, 1.0], [2.0, 3.0]])), [[0, 0], [0, 1]])


def test_bm25_reads_prompt_and_completion_of_candidates_and_only_the_prompts_of_targets():
    texts = Texts(["name", "other", "other"], ["x", "name", "wanted"])
    pool = FakePool(ids=["a", "b", "c"], texts=texts, target_texts=Texts(["name"], ["wanted"]))
    ranking = STRATEGIES["bm25"].rank(pool)
    assert order_of("bm25", pool) == ["a", "b", "c"] and ranking.scores[2] == 0 < ranking.scores[1]


def test_bm25_does_not_depend_on_the_order_of_arrival():
    ids = [f"row {number}" for number in range(len(DOCUMENTS))]
    found = set()
    for order in itertools.islice(itertools.permutations(range(len(ids))), 0, None, 37):
        texts = Texts(
            [DOCUMENTS[one].split("\n")[0] for one in order], [DOCUMENTS[one].split("\n")[1] for one in order]
        )
        pool = FakePool(ids=[ids[one] for one in order], texts=texts, target_texts=Texts(QUERIES, [""] * len(QUERIES)))
        found.add((tuple(order_of("bm25", pool)), STRATEGIES["bm25"].rank(pool).scores.tobytes()))
    assert len(found) == 1


# -- RDS+ --------------------------------------------------------------------------------------------------------


def slow_turns(similarities, ids, wanted):
    """Each target in turn takes the most similar row left."""
    left, order = set(range(len(ids))), []
    for turn in itertools.cycle(range(similarities.shape[1])):
        if len(order) == wanted or not left:
            return order
        order.append(min(left, key=lambda row: (-similarities[row, turn], ids[row])))
        left.remove(order[-1])


@pytest.mark.parametrize("wanted", [1, 7, 30, 99])
def test_targets_take_their_most_similar_rows_in_turn(wanted):
    rng = np.random.default_rng(3)
    similarities = np.round(rng.uniform(-1, 1, (30, 4)), 1).astype(np.float32)  # with ties
    ids = [f"{one:02d}" for one in rng.permutation(30)]
    found = STRATEGIES["rds"].rank(FakePool(ids=ids, similarities=similarities, wanted=wanted))
    assert found.order.tolist() == slow_turns(similarities, ids, wanted)


# -- maximal marginal relevance ----------------------------------------------------------------------------------


def slow_mmr(scores, vectors, ids, wanted):
    """The formula, pair by pair."""
    best = sorted(range(len(ids)), key=lambda row: (-scores[row], ids[row]))[: 4 * wanted]
    low, high = scores[best[-1]], scores[best[0]]
    order = []
    while len(order) < min(wanted, len(best)):
        values = {}
        for row in best:
            if row not in order:
                relevance = (scores[row] - low) / (high - low)
                values[row] = 0.7 * relevance - 0.3 * max(
                    (float(vectors[row] @ vectors[one]) for one in order), default=0
                )
        order.append(max(values, key=values.get))  # of equal ones the first in `best`
    return order


class VectorPool(FakePool):
    """A pool with rows of vectors."""

    def vectors(self, positions):
        return self.stored[positions]


def vector_pool(ids, scores, vectors, wanted):
    pool = VectorPool(ids=ids, direction_scores=scores, wanted=wanted)
    pool.stored = vectors
    return pool


@pytest.mark.parametrize("wanted", [1, 5, 10, 40])
def test_mmr_is_that_of_the_formula(wanted):
    rng = np.random.default_rng(4)
    centres = rng.normal(size=(6, 12))
    vectors = (centres[rng.integers(0, 6, 40)] + 0.3 * rng.normal(size=(40, 12))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = (0.1 * rng.uniform(size=40)).astype(np.float32)
    ids = [f"{one:02d}" for one in rng.permutation(40)]
    pool = vector_pool(ids, scores, vectors, wanted)
    ranking = STRATEGIES["prism-mmr"].rank(pool)
    assert ranking.order.tolist() == slow_mmr(scores.astype(float), vectors.astype(float), ids, wanted)
    np.testing.assert_array_equal(ranking.scores, scores[ranking.order])
    if wanted == 10:
        plain = np.argsort(-scores)[:10]
        assert set(ranking.order) != set(plain)
        similarity = [np.triu(vectors[rows] @ vectors[rows].T, 1).mean() for rows in (ranking.order, plain)]
        assert similarity[0] < similarity[1]


def test_mmr_passes_over_a_copy_of_a_better_row():
    vectors = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
    pool = vector_pool(["a", "copy of a", "b", "c"], np.float32([0.10, 0.10, 0.08, 0.02]), vectors, 2)
    assert order_of("prism-mmr", pool) == ["a", "b"]


def test_mmr_breaks_ties_by_id_whatever_the_order_of_arrival():
    rows = [("d", 0.2, 0), ("a", 0.2, 1), ("c", 0.2, 2), ("b", 0.1, 3)]
    orders = set()
    for shuffled in itertools.permutations(rows):
        ids, scores, axes = zip(*shuffled, strict=True)
        pool = vector_pool(list(ids), np.float32(scores), np.eye(4, dtype=np.float32)[list(axes)], 4)
        orders.add(tuple(order_of("prism-mmr", pool)))
    assert orders == {("a", "c", "d", "b")}


def test_mmr_of_equal_influences_still_spreads():
    vectors = np.eye(2, dtype=np.float32)[[0, 0, 1]]
    assert order_of("prism-mmr", vector_pool(["a", "b", "c"], np.float32([0.1, 0.1, 0.1]), vectors, 2)) == ["a", "c"]


# -- the page ----------------------------------------------------------------------------------------------------


def page():
    return (Path(__file__).resolve().parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")


def test_the_page_lists_every_strategy_once():
    assert sorted(re.findall(r"^\| `([a-z0-9-]+)` \|", page(), re.MULTILINE)) == sorted(STRATEGIES)


def test_the_example_on_the_page_passes_its_own_test(monkeypatch):
    module_text, test_text = re.findall(r"```python\n(.*?)```", page(), re.DOTALL)
    name = re.search(r"`prism_assets/selection/strategies/(\w+)\.py`", page())[1]
    module = ModuleType(name)
    exec(module_text, module.__dict__)
    monkeypatch.setitem(sys.modules, f"prism_assets.selection.strategies.{name}", module)
    namespace = {}
    exec(test_text, namespace)
    (test,) = [value for key, value in namespace.items() if key.startswith("test_")]
    test()
