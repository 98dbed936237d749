"""`prism experiment`: the strategies over several splits and seeds."""

import json

from prism_assets.cli.common import (
    AsJson,
    Config,
    Targets,
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
def experiment(
    config: Config = None,
    target: Targets = None,
    as_json: AsJson = False,
) -> None:
    """Compare the strategies over several splits and seeds, and say what follows. Goes on where it was stopped."""
    with expected_failures():
        settings = read_settings(config)
        known_targets(settings, target)
        from prism_assets.ops.pipeline import steps_of

        _, results = run_steps(settings, target, steps_of("experiment"))
        page = settings.storage.report / "experiment.html"
        found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["targets"]
        found = {name: one for name, one in found.items() if not target or name in target}
        if as_json:
            print_json({"computed": results[-1].computed, "page": str(page), "targets": found})
            return
        from prism_assets.experiment.summary import table

        for name, one in found.items():
            header, *rows = table({name: one})
            # The interval of a difference on a line of its own.
            shown = [[cell.replace(" [", "\n[") for cell in row[1:]] for row in rows]
            over = f"mean ± standard deviation over {one['unit']}s"
            title = f"{name}: {over}; differences in target preference, 95% intervals"
            print_table(header[1:], shown, title=title)
            for sentence in one["verdict"]:
                say(f"  {sentence}")
            say()
        say(f"Page:  {page}")
