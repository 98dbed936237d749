"""BM25: candidates that share rare words with the targets' prompts. No model looks at them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from prism_assets.selection.strategies.base import PoolView, Ranking, Strategy, by_scores

# Every word counts, single letters and digits too, and no list of stop words, which would be one language's: words that
# are in every document get almost no weight by their document frequency.
WORD = r"(?u)\w+"
K1, B = 1.5, 0.75  # the usual ones, and the library's


def lexical_scores(documents: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """BM25 of each document for each query, float64 [n, m], as Lucene computes it (Robertson and Zaragoza 2009; the
    variant in Kamphuis et al. 2020), by the library bm25s (Lù 2024, arXiv 2407.03618):

        Σ_w ln(1 + (n − n_w + ½) / (n_w + ½)) · f_w / (f_w + K1 (1 − B + B l / l̄))

    over the words w of the query, repeated ones as often as they occur; n_w documents have the word, f_w times in
    this one; l is the document's number of words, l̄ the mean of l. Words are runs of letters, digits and underscores in
    lower case: a script that writes no spaces is matched by whole runs.
    """
    import bm25s

    def words(texts: Sequence[str], ids: bool) -> Any:
        return bm25s.tokenize(
            list(texts),
            token_pattern=WORD,
            stopwords=None,  # pyright: ignore[reportArgumentType]
            return_ids=ids,
            show_progress=False,
        )

    scores = np.zeros((len(documents), len(queries)))
    bags = words(documents, ids=True)
    if not bags.vocab:
        return scores
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index(bags, create_empty_token=False, show_progress=False)
    for column, query in enumerate(words(queries, ids=False)):
        known = [word for word in query if word in index.vocab_dict]
        if known:
            scores[:, column] = index.get_scores(known)
    return scores


def min_max(scores: np.ndarray) -> np.ndarray:
    """Each column [n] scaled to run from 0 to 1; a column of equal scores becomes 0."""
    low, high = scores.min(axis=0), scores.max(axis=0)
    return (scores - low) / np.where(high > low, high - low, 1)


def _bm25(pool: PoolView) -> Ranking:
    """Rows by the mean over targets of BM25 scaled to [0, 1] for each target; ties by id.

    A query is a target's prompt alone: its completion is what shall be learned, and a target of pairs has two. A
    document is a candidate's prompt and completion. BM25 sums over the words of a query, so raw scores would let the
    targets with the longest prompts decide: each target's are min-max scaled first (Lee 1997, "Analyses of multiple
    evidence combination"), then added up (CombSUM of Fox and Shaw 1994). BM25 is a baseline of LESS (Xia et al. 2024)
    too; how queries are combined there we have not found, so this is our choice.
    """
    texts = pool.texts()
    documents = [f"{prompt}\n{completion}" for prompt, completion in zip(*texts, strict=True)]
    return by_scores(min_max(lexical_scores(documents, pool.target_texts().prompts)).mean(axis=1), pool.ids)


BM25 = Strategy(
    "bm25", "candidates whose prompt and completion share rare words with the targets' prompts",
    rank=_bm25, reads=frozenset({"text"}),
)  # fmt: skip
