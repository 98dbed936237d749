"""What a wheel installs, tried from a folder that holds no clone: `python installed_package.py` in a fresh environment.

Not collected by pytest: `make wheel-test` builds the wheel, installs it and runs this file outside of the repository.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path

BIN = Path(sys.executable).parent
PORT = 3917


def prism(*arguments: str, cwd: Path) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([BIN / "prism", *arguments], cwd=cwd, capture_output=True, text=True, timeout=600)
    print(f"prism {' '.join(arguments)}: exit {done.returncode}", flush=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def small_project(folder: Path) -> None:
    """The embedded model, 40 candidates and 6 targets that reverse a word."""
    import yaml

    import prism_assets.demo

    rng = random.Random(0)

    def rows(number: int) -> list[dict[str, str]]:
        words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 6))) for _ in range(number)]
        return [{"prompt": f"reverse: {word}=", "completion": word[::-1], "answer": word[::-1]} for word in words]

    for name, number in (("inbox/pool", 40), ("target", 6), ("eval", 6)):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [{key: row[key] for key in row if key != "answer" or name == "eval"} for row in rows(number)]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    settings = {
        "model": {"name": str(Path(prism_assets.demo.__file__).parent / "model")},
        "tokenization": {"max_length": 64, "separator": ""},
        "warmup": {"share": 1, "epochs": 1, "learning_rate": 1e-3},
        "features": {"sketch_dim": 64},
        "candidates": {"inbox": "inbox"},
        "targets": {"reverse": {"examples": "target.jsonl", "eval": "eval.jsonl"}},
        "selection": {"budget": 5},
        "strategies": ["prism", "random"],
        "training": {"steps": 2},
        "evaluation": {"max_new_tokens": 4},
        "seeds": [0],
        "storage": {"root": "lake", "report": "report"},
    }
    (folder / "prism.yaml").write_text(yaml.safe_dump(settings))


def small_demo(folder: Path) -> None:
    """The demo's data and settings as the wheel makes them, cut down to a run of seconds: `prism demo` takes them as
    they are.

    One shard of 60 candidates is left, and few targets and held-out records, so no figure says anything.
    """
    import yaml

    from prism_assets.demo.data import demo_settings, write_demo_data

    write_demo_data(folder, seed=0)
    shards = sorted((folder / "inbox").iterdir())
    assert [one.name for one in shards] == [
        *("strings-1.jsonl", "strings-2.jsonl.gz", "strings-3.parquet", "strings-4.jsonl.zst")
    ]
    for shard in shards[1:]:
        shard.unlink()
    for path, number in (
        (shards[0], 60),
        *((one, 8) for one in sorted((folder / "targets").glob("*/*.jsonl"))),
    ):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:number]))
    settings = demo_settings()
    settings |= {"strategies": ["prism", "random"], "seeds": [0]}
    settings["training"] |= {"epochs": 1, "steps": 2}
    (folder / "prism.yaml").write_text(yaml.safe_dump(settings))


def try_the_ui(folder: Path) -> None:
    """The webserver answers and has loaded the code location."""
    process = subprocess.Popen(
        [BIN / "prism", "ui", "--port", str(PORT)],
        **{"cwd": folder, "start_new_session": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL},
    )
    query = json.dumps({"query": "{ assetNodes { assetKey { path } } }"}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/graphql", query, {"Content-Type": "application/json"})
    try:
        until, assets = time.monotonic() + 90, []
        while not assets:
            assert time.monotonic() < until, "the UI did not answer within 90 s"
            assert process.poll() is None, f"prism ui ended with {process.returncode}"
            time.sleep(1)
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    assets = json.loads(answer.read())["data"]["assetNodes"]
            except OSError:
                continue
        print(f"prism ui: {len(assets)} assets", flush=True)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(150)  # both processes end their threads first, which takes time on a busy machine


def main() -> None:
    import prism_assets

    assert Path(prism_assets.__file__).is_relative_to(sys.prefix), prism_assets.__file__
    assert find_spec("resources") is None and find_spec("definitions") is None
    tops = {file.parts[0] for file in files("prism-assets") or () if not file.parts[0].startswith("..")}
    assert {one for one in tops if not one.endswith(".dist-info")} == {"prism_assets"}, tops
    folder = Path(tempfile.mkdtemp(prefix="prism-wheel-"))
    try:
        for name in ("DAGSTER_HOME", "PRISM_CONFIG", "PYTHONPATH"):
            os.environ.pop(name, None)
        prism("--help", cwd=folder)
        (folder / "fresh").mkdir()
        prism("init", "fresh", cwd=folder)
        small_project(folder)
        prism("doctor", cwd=folder)
        assert "prism" in prism("run", cwd=folder)
        assert len(json.loads(prism("query", "reverse", "-k", "3", "--json", cwd=folder))) == 3
        prism("sql", "SELECT count(*) FROM candidates", cwd=folder)
        prism("doctor", cwd=folder)
        assert (
            "up to date"
            in subprocess.run([BIN / "prism", "run"], cwd=folder, capture_output=True, text=True, timeout=600).stderr
        )
        try_the_ui(folder)
        (folder / "demo").mkdir()
        small_demo(folder / "demo")
        assert "report.html" in prism("demo", "demo", cwd=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("The installed package works.")


if __name__ == "__main__":
    main()
