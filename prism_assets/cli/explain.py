"""`prism explain`: why a candidate ranks where it does."""

from typing import Annotated, Any

import typer

from prism_assets.cli.common import (
    AsJson,
    Config,
    app,
    expected_failures,
    known_targets,
    print_json,
    print_table,
    read_settings,
    say,
    short,
)


@app.command()
def explain(
    example: Annotated[str, typer.Argument(help="A candidate: its id (4 digits or more of it) or its record id.")],
    target: Annotated[str, typer.Option("--target", "-t", help="A target of prism.yaml.")],
    strategy: Annotated[str, typer.Option(help="prism, uniform or less.")] = "prism",
    exact: Annotated[
        bool | None, typer.Option("--exact/--no-exact", help="Measure the sketch's error; needs the model.")
    ] = None,
    neighbours: Annotated[int, typer.Option(min=0, help="How many nearest neighbours.")] = 5,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Why a candidate ranks where it does: its score by targets, its ranks, its neighbours, earlier versions."""
    with expected_failures():
        settings = read_settings(config)
        known_targets(settings, [target])
        from prism_assets.engines import open_stage

        stage = open_stage(settings)
        from prism_assets.explanation.explainer import Explainer

        with Explainer(stage, target=target, strategy=strategy, exact=exact) as explainer:
            found = explainer.explain(example, neighbours)
        if as_json:
            print_json(found.as_dict())
            return
        _print_explanation(found, settings.targets[target].use == "remove")


def _print_explanation(found: Any, removes: bool) -> None:
    say(f"{found.id}: {short(found.prompt, 60)} → {short(found.completion, 60)}")
    say(f"{found.shard}, row {found.row} (line {found.line} of its file); feature version {found.version}")
    for note in found.notes:
        say(note)
    exact = (
        f"exact score {found.exact_score:.4g}"
        if found.exact_score is not None
        else f"no exact score: {found.why_not_exact}"
    )
    role = "is not what selects: exact scores rank" if found.reranked else "ranks"
    which = "Score" if found.exact_score is None else "Exact score"
    say(f"score {found.score:.4g}, from the sketch, which {role}; {exact}")
    print_table(
        ["target", "weight", "influence", "contribution"],
        [[short(what, 72), *numbers] for what, *numbers in found.score_rows(limit=20)],
        title=f"{which} for {found.target} under {found.strategy}, by targets",
    )
    marks = {True: "yes", False: "no", None: None}
    ranks = [[one.strategy, one.rank, one.of, one.score, one.by, marks[one.selected]] for one in found.ranks]
    taken = "removed" if removes else "selected"
    print_table(["strategy", "rank", "of", "score", "by", taken], ranks, title="Rank under each strategy")
    columns = ["similarity", "source", "prompt", "completion", "id"]
    near = [[short(getattr(one, name)) for name in columns] for one in found.neighbours]
    print_table(columns, near, title="Nearest in gradient space")
    if found.earlier:
        columns = ["version", "used", "rank", "of", "score", "note"]
        earlier = [[getattr(one, name) for name in columns] for one in found.earlier]
        print_table(columns, earlier, title="In other feature versions")
