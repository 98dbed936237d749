"""Strategies: ways to rank the canonical live rows. Each is an entry of a small module and declares what it reads."""

from prism_assets.selection.strategies import bm25, directions, diversity, perplexity, plain, rds, several_directions
from prism_assets.selection.strategies.base import Input, Pool, Ranking, Strategy, TargetScores

__all__ = ["STRATEGIES", "Input", "Pool", "Ranking", "Strategy", "TargetScores"]

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        directions.PRISM,
        directions.UNIFORM,
        directions.LESS,
        directions.PRISM_UNIT,
        several_directions.PRISM_COVER,
        several_directions.PRISM_ROUND_ROBIN,
        several_directions.LESS_MAX,
        diversity.PRISM_MMR,
        plain.RANDOM,
        plain.LENGTH,
        perplexity.PERPLEXITY,
        bm25.BM25,
        rds.RDS,
        plain.FULL,
    )
}
