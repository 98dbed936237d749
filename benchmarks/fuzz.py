"""Ten thousand malformed records and files: does one crash the reader, pass for something else, or cost too much?

    python -m benchmarks.fuzz --json
    python -m benchmarks.fuzz --case 4711        # one case again: what it is, what was expected, what came of it

A case is one file, drawn from its seed: records of a grammar (every layout and field of docs/formats.md, most of them
wrong in one place) as JSON Lines, plain, .gz or .zst, as JSON array, CSV, TSV, Parquet or Arrow; or a good file that is
damaged (cut, flipped bits, bytes inserted, missing or zero, padding, twice, another encoding, another extension); or
one that is empty, or beyond the limits. What must become of it is known without the reader (`fuzz_records`,
`fuzz_files`). It is read as candidates, targets or held-out records. Of every fourth the examples are tokenised, and of
candidates the tables are published, by the code that ingests an inbox.

- `crashes`: any exception but UnreadableFile and MixedTargets, a process that died or hung, a reject that cannot be
  stored.
- `silently_accepted`: a record that is bad by construction became an example, or a good one an example of another text;
  a record is neither among the examples nor among the rejects of a file that was not refused; a file without its end or
  with a wrong checksum was not refused.
- `refused_without_need`: a record or a file that is good by construction was rejected.
- `too_slow`, `too_large`: more CPU seconds or memory for a case than `SECONDS` and `MIB`.
- `slowest_seconds`: CPU time of the case that took longest to read. `peak_mib`: the most memory of a process that read
  cases, and `start_mib` what it had before the first; each reads `BATCH` of them.
- `failures`: seed, kind and reason of each, for `--case`.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fuzz_files import Case, case_of
from benchmarks.fuzz_records import Given, Turn, is_unicode

SECONDS, MIB = 5.0, 512  # of a case
BATCH = 500
PATIENCE = 120.0  # wall seconds without a finished case after which a process counts as hanging
MAX_LENGTH = 512
ENCODED = 4  # of so many cases one is tokenised
KINDS = ("crash", "silently_accepted", "refused_without_need", "too_slow", "too_large")


class Failure(NamedTuple):
    """What is wrong about what came of a case: one of `KINDS`, and why."""

    kind: str
    why: str


class Outcome(NamedTuple):
    """What came of a case: its examples and rejects in file order, or the error that was raised."""

    found: list[Any]
    error: Exception | None = None


# -- one case -----------------------------------------------------------------------------------------------------


def options_of(case: Case) -> dict[str, Any]:
    """How the file is to be read."""
    from prism_assets.corpus.limits import Limits

    return {
        "kind": case.kind,
        "mixed": case.mixed,
        "limits": Limits(**case.limits),
        "columns": case.columns or None,
    }


def read(path: Path, case: Case) -> Outcome:
    """Read the file of a case."""
    from prism_assets.corpus.files import iter_examples

    try:
        return Outcome(list(iter_examples(path, **options_of(case))))
    except Exception as error:
        return Outcome([], error)


def judge(case: Case, outcome: Outcome) -> Iterator[Failure]:
    """What is wrong about an outcome."""
    from prism_assets.corpus.records import Example
    from prism_assets.errors import MixedTargets, UnreadableFile

    if isinstance(outcome.error, (UnreadableFile, MixedTargets)):
        if case.refusal == "never":
            yield Failure("refused_without_need", f"the file: {outcome.error}")
        return
    if outcome.error is not None:
        yield Failure("crash", _told(outcome.error))
        return
    if case.refusal == "must":
        yield Failure("silently_accepted", f"the file was read, {len(outcome.found)} records")
        return
    by_line = {one.line: one for one in outcome.found}
    if len(by_line) < len(outcome.found):
        yield Failure("silently_accepted", "two records of one line")
    if case.counted and by_line.keys() != case.by_line.keys():
        differing = sorted(by_line.keys() ^ case.by_line.keys())[:5]
        yield Failure(
            "silently_accepted", f"{len(case.by_line)} records given, {len(by_line)} counted; lines {differing}"
        )
        return
    for line, one in by_line.items():
        is_example = isinstance(one, Example)
        if is_example and case.no_examples:
            yield Failure("silently_accepted", f"line {line} became an example")
        if not is_example and not all(is_unicode(text) for text in one[1:]):
            yield Failure("crash", f"the reject of line {line} cannot be stored: {one!r}")
        if line in case.by_line:
            yield from _judge_record(case.by_line[line], one, is_example)


def _judge_record(given: Given, found: Any, is_example: bool) -> Iterator[Failure]:
    if is_example and given.verdict == "bad":
        yield Failure("silently_accepted", f"{given.what}, line {found.line}: {_words(given)}")
    elif not is_example and given.verdict == "good":
        yield Failure("refused_without_need", f"{given.what}, line {found.line}: {found.field}: {found.reason[:120]}")
    elif is_example and given.verdict == "good":
        turns = tuple(Turn(one.role, "" if one.role == "tools" else one.content, one.learn) for one in found.messages)
        beside = list(_texts([one.as_turn() for one in found.messages]))
        if turns != given.turns or found.rejected != given.rejected:
            yield Failure(
                "silently_accepted", f"{given.what}, line {found.line}: other text: {turns} for {given.turns}"
            )
        elif not all(text in beside for text in given.inside):
            yield Failure("silently_accepted", f"{given.what}, line {found.line}: lost {given.inside}")


def _told(error: Exception) -> str:
    """What an exception says, and where it was raised."""
    where = "".join(
        f" at {Path(one.filename).name}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)[-1:]
    )
    return f"{type(error).__name__}: {str(error)[:200]}{where}"


def _words(given: Given) -> str:
    from benchmarks.fuzz_records import to_json

    return to_json(given.value)[:200]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, str):
        yield value


# -- tokens and tables ----------------------------------------------------------------------------------------------


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes, so that every text can be read back, with a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", chat_template=template
    )


def encoder() -> Any:
    """The project's encoder with that tokenizer."""
    from prism_assets.corpus.encoder import Encoder

    return Encoder(byte_tokenizer(), max_length=MAX_LENGTH)


def judge_tokens(case: Case, outcome: Outcome, encoder: Any) -> Iterator[Failure]:
    """What is wrong about the tokens of the examples: each is tokenised, its completion whole, or rejected."""
    from prism_assets.corpus.records import Example, Reject
    from prism_assets.corpus.token_tables import encode_one

    for example in outcome.found:
        if not isinstance(example, Example):
            continue
        try:
            tokens = encode_one(example, encoder)
        except Exception as error:
            yield Failure("crash", f"tokenising line {example.line}: {_told(error)}")
            continue
        if isinstance(tokens, Reject):
            given = case.by_line.get(example.line)
            simple = all(one.role in ("user", "assistant", "text") and not one.extra for one in example.messages)
            short = sum(len(one.content.encode()) + 20 for one in example.messages) < MAX_LENGTH
            if simple and short and given is not None and given.verdict == "good" and not example.rejected:
                yield Failure("refused_without_need", f"{given.what}, line {example.line}: {tokens.reason[:120]}")
        elif len(tokens.input_ids) > MAX_LENGTH:
            yield Failure("silently_accepted", f"line {example.line}: {len(tokens.input_ids)} tokens")
        elif not tokens.truncated:
            learned = encoder.tokenizer.decode(tokens.input_ids[tokens.loss_mask])
            if example.completion_text[1:] not in learned:  # of a text the first token is not learned
                yield Failure("silently_accepted", f"line {example.line}: the completion is not among the tokens")


def judge_tables(path: Path, case: Case, outcome: Outcome, encoder: Any, folder: Path) -> Iterator[Failure]:
    """What is wrong about the tables that a file of candidates becomes: the records are those that were read."""
    from benchmarks.intake import OnlyALake
    from prism_assets.corpus.files import iter_examples
    from prism_assets.corpus.reading import read_tables
    from prism_assets.corpus.record_file import RecordFile
    from prism_assets.corpus.token_tables import CANDIDATE_SCHEMA
    from prism_assets.errors import UnreadableFile
    from prism_assets.resources.lake import Recipe

    stage: Any = OnlyALake(folder)
    stage.log.setLevel("CRITICAL")
    source = RecordFile(
        path=path,
        sha256="",
        table="candidates",
        rejects="rejects",
        fields="candidate_fields",
        partition="rows",
        schema=CANDIDATE_SCHEMA,
        read=partial(iter_examples, **options_of(case)),
        may_be_unreadable=True,
    )
    try:
        tables = read_tables(stage, source, encoder)
        published = [
            stage.lake.publish(Recipe(name, 1, {"seed": case.seed}), rows)
            for name, rows in zip(("candidates", "rejects", "candidate_fields"), tables, strict=True)
        ]
        rows, rejects, fields = (stage.lake.read_table(one).to_pylist() for one in published)
    except Exception as error:
        yield Failure("crash", f"publishing: {_told(error)}")
        return
    if isinstance(outcome.error, UnreadableFile):
        if rows or fields or len(rejects) != 1:
            yield Failure("silently_accepted", f"of an unreadable file {len(rows)} rows, {len(rejects)} rejects")
        return
    lines = [one.line for one in outcome.found]
    if sorted(one["line"] for one in [*rows, *rejects]) != sorted(lines) or len(fields) != len(rows):
        yield Failure("silently_accepted", f"{len(lines)} records read, {len(rows)} rows, {len(rejects)} rejects")
    texts = {one.line: one for one in outcome.found}
    for row in rows:
        if row["completion"] != texts[row["line"]].completion_text:
            yield Failure("silently_accepted", f"line {row['line']}: another completion in the table")


class Measured(NamedTuple):
    """A case that was read: its failures, CPU seconds, how it came out, and the memory of the process at most."""

    seed: int
    failures: list[Failure]
    seconds: float
    outcome: str
    mib: float


def measured(case: Case, folder: Path, encoder: Any) -> Measured:
    """Read a case and judge what comes of it; `encoder` None leaves tokens out."""
    path = folder / case.name
    path.write_bytes(case.content)
    _forget_peak()
    held, begun = resident_mib("VmRSS"), time.process_time()
    outcome = read(path, case)
    seconds = time.process_time() - begun
    failures = list(judge(case, outcome))
    if encoder is not None and outcome.error is None:
        failures += judge_tokens(case, outcome, encoder)
    if encoder is not None and case.kind == "candidate" and not failures:
        failures += judge_tables(path, case, outcome, encoder, folder / "lake")
    peak = resident_mib("VmHWM")
    if seconds > SECONDS:
        failures.append(Failure("too_slow", f"{seconds:.1f} CPU seconds"))
    if peak - held > MIB:
        failures.append(Failure("too_large", f"{peak - held:.0f} MiB"))
    path.unlink()
    came = "refused" if outcome.error is not None else "read"
    return Measured(case.seed, failures, seconds, came, peak)


def resident_mib(name: str) -> float:
    """Memory of this process now ("VmRSS") or at most ("VmHWM"), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def _forget_peak() -> None:
    """What the process had at most counts from now on, where the system can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


# -- many cases ---------------------------------------------------------------------------------------------------


def work(seeds: Sequence[int]) -> None:
    """Read these cases, in a process of their own: a line of JSON after each."""
    with tempfile.TemporaryDirectory(prefix="prism-fuzz-") as folder:
        encode = encoder()
        measured(case_of(-1), Path(folder), encode)  # what is imported or made once counts for no case
        print(json.dumps({"start_mib": resident_mib("VmRSS")}), flush=True)
        for seed in seeds:
            found = measured(case_of(seed), Path(folder), encode if seed % ENCODED == 0 else None)
            print(json.dumps(found._asdict()), flush=True)


def lines_of(process: subprocess.Popen[bytes], patience: float) -> Iterator[dict[str, Any]]:
    """What a process prints, line by line; it is killed where it prints nothing for so many seconds."""
    assert process.stdout is not None
    held = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], patience)
        if not ready:
            process.kill()
            return
        more = os.read(process.stdout.fileno(), 2**16)
        if not more:
            return
        *lines, held = (held + more).split(b"\n")
        yield from map(json.loads, lines)


def benchmark(
    seeds: Sequence[int],
    worker: Sequence[str] = (sys.executable, "-m", "benchmarks.fuzz"),
    batch: int = BATCH,
    patience: float = PATIENCE,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The whole measurement."""
    failures: list[dict[str, Any]] = []
    outcomes: Counter[str] = Counter()
    slowest, slowest_seed, peak, start, done = 0.0, None, 0.0, 0.0, 0
    while done < len(seeds):
        first = seeds[done]
        count = min(batch, len(seeds) - done)
        command = [*worker, "--from", str(first), "--cases", str(count)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        finished = 0
        for one in lines_of(process, patience):
            if "start_mib" in one:
                start = max(start, one["start_mib"])
                continue
            finished += 1
            failures += [{"seed": one["seed"], "kind": kind, "why": why} for kind, why in one["failures"]]
            outcomes[one["outcome"]] += 1
            peak = max(peak, one["mib"])
            if one["seconds"] > slowest:
                slowest, slowest_seed = one["seconds"], one["seed"]
        _, said = process.communicate()
        if finished < count:  # it died in the next one
            why = f"the process ended with status {process.returncode}: {said.decode(errors='replace')[-300:]}"
            failures.append({"seed": seeds[done + finished], "kind": "crash", "why": why})
            finished += 1
        done += finished
        log(f"{done} of {len(seeds)} cases, {len(failures)} failures")
    kinds = Counter(one["kind"] for one in failures)
    return {
        "cases": len(seeds),
        "crashes": kinds["crash"],
        **{kind: kinds[kind] for kind in KINDS[1:]},
        "slowest_seconds": round(slowest, 3),
        "slowest_seed": slowest_seed,
        "peak_mib": round(peak),
        "start_mib": round(start),
        "files_read": outcomes["read"],
        "files_refused": outcomes["refused"],
        "failures": failures,
    }


def repeat(seed: int) -> bool:
    """Print a case and what comes of it; whether nothing is wrong."""
    case = case_of(seed)
    print(f"case {seed}: {case.what}, {case.name}, read as {case.kind}, {options_of(case)}")
    print(f"{len(case.content)} bytes: {case.content[:2000]!r}")
    print(f"refusal of the file: {case.refusal}; all records known: {case.counted}; no examples: {case.no_examples}")
    for line, one in case.by_line.items():
        print(f"  given, line {line}: {one.verdict}, {one.what}: {_words(one)}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / case.name
        path.write_bytes(case.content)
        outcome = read(path, case)
        if outcome.error is not None:
            traceback.print_exception(outcome.error)
        for one in outcome.found:
            print(f"  found: {str(one)[:600]}")
        found = measured(case, Path(folder), encoder())
    for failure in found.failures:
        print(f"{failure.kind}: {failure.why}")
    print(f"{found.seconds:.3f} CPU seconds, {found.mib:.0f} MiB")
    return not found.failures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--case", type=int, help="the seed of one case, to be repeated and explained")
    parser.add_argument("--json", action="store_true", help="print JSON alone, on one line")
    parser.add_argument("--from", dest="first", type=int, help=argparse.SUPPRESS)  # the process that reads
    options = parser.parse_args()
    if options.case is not None:
        sys.exit(0 if repeat(options.case) else 1)
    if options.first is not None:
        work(range(options.first, options.first + options.cases))
        return
    found = benchmark(
        range(options.seed, options.seed + options.cases),
        log=lambda line: None if options.json else print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(found, indent=None if options.json else 1))
    sys.exit(1 if found["failures"] else 0)


if __name__ == "__main__":
    main()
