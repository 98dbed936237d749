"""Strategies: ways to rank the canonical live rows. Each is an entry of a small module and declares what it reads."""

from prism_assets.selection.strategies import bm25, directions, diversity, per_target, perplexity, plain, rds
from prism_assets.selection.strategies.base import Input, PoolView, Ranking, Strategy, TargetScores

__all__ = ["STRATEGIES", "Input", "PoolView", "Ranking", "Strategy", "TargetScores"]

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        directions.PRISM,
        directions.UNIFORM,
        directions.LESS,
        directions.PRISM_UNIT,
        directions.PRISM_SIGMOID,
        per_target.PRISM_COVER,
        per_target.PRISM_ROUND_ROBIN,
        per_target.LESS_MAX,
        diversity.PRISM_MMR,
        plain.RANDOM,
        plain.LENGTH,
        perplexity.PERPLEXITY,
        bm25.BM25,
        rds.RDS,
        plain.FULL,
        plain.ORACLE,
    )
}
