"""`prism trust`: whether the scores of a target can be trusted."""

from typing import Annotated

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
    run_steps,
    say,
)


@app.command()
def trust(
    target: Annotated[str, typer.Argument(help="A target of prism.yaml.")],
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Whether a target's weights, direction and scores can be trusted: measures what was not measured yet, and explains
    it."""
    with expected_failures():
        settings = read_settings(config)
        known_targets(settings, [target], "")
        from prism_assets.ops.pipeline import steps_of

        loaded, _ = run_steps(settings, [target], steps_of("trust"), quiet=True)
        from prism_assets.trust.trust import trust_of
        from prism_assets.trust.verdict import findings

        notes = trust_of(loaded.stage, target)
        assert notes is not None, target  # the step has just made it
        found = findings(notes)
        if as_json:
            print_json({"target": target, "findings": [one._asdict() for one in found], "measurements": notes})
            return
        marks = {True: "holds", False: "does not hold", None: "not measured"}
        rows = [[one.question, marks[one.passed], one.sentence] for one in found]
        print_table(["question", "", "what the measurements say"], rows, title=f"Trust in {target}")
        say("The report shows this from the next `prism run` on.")
