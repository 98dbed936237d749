"""`prism select`: from the files in the inbox to the selections, and no further."""

from prism_assets.cli.common import (
    AsJson,
    Config,
    Targets,
    app,
    expected_failures,
    known_targets,
    print_files,
    print_intake,
    print_json,
    read_settings,
    run_steps,
    say,
)


@app.command()
def select(config: Config = None, target: Targets = None, as_json: AsJson = False) -> None:
    """Select rows for every target and strategy, without fine-tuning on them. What exists is not computed again."""
    with expected_failures():
        settings = read_settings(config)
        known_targets(settings, target)
        from prism_assets.ops.doctor import intake_of_today
        from prism_assets.ops.pipeline import steps_of
        from prism_assets.selection.handed_out import hand_out

        loaded, results = run_steps(settings, target, steps_of("select"))
        intake, files = intake_of_today(loaded.stage), hand_out(loaded.stage, target)
        if as_json:
            steps = [{"step": one.step.title, "computed": one.computed, "seconds": one.seconds} for one in results]
            given = None if intake is None else intake.as_data()
            print_json({"steps": steps, "intake": given, "files": [one._asdict() for one in files]})
            return
        if intake is not None:
            print_intake(intake)
            say()
        print_files(files)
        say("\nTo fine-tune on them and see which helps: prism run")
