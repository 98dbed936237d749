"""Scores of held-out records under one adapter, as artefacts."""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from prism_assets.corpus.encoding import encoder_of
from prism_assets.corpus.target_set import target_set
from prism_assets.identity import base_key, split_key
from prism_assets.reference.engine import gradient_engine
from prism_assets.resources.lake import Artifact, Recipe, Rows
from prism_assets.stage import Made, Stage
from prism_assets.training.adapter import adapter_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import pyarrow as pa
    from peft import PeftModel

    from prism_assets.corpus.encoder import TokenizedExample
    from prism_assets.gradients.engine import GradientEngine


def make_scores(stage: Stage, records: Artifact, adapter: Artifact | None, key: str) -> Made:
    """One row per held-out record under one adapter (None: where fine-tuning starts), and the means in the notes."""
    recipe = scores_recipe(stage, records, adapter, key)
    return stage.make(recipe, lambda: _score(stage, stage.lake.read_table(records), adapter))


def scores_recipe(stage: Stage, records: Artifact, adapter: Artifact | None, key: str) -> Recipe:
    """What the scores of these records are made from."""
    return stage.recipe(
        "evaluations",
        {
            "max_new_tokens": stage.settings.evaluation.max_new_tokens,
            "lora": stage.lora_identity,
            "dtype": stage.dtype,
        },
        {"model": stage.model_identity.fingerprint, "records": records, "adapter": adapter or "none"},
        partition=key if adapter else base_key(split_key(key)[0]),
    )


def seed_note(adapter: Artifact | None) -> dict[str, Any]:
    """The note that says which seed's adapter was evaluated."""
    return {"seed": adapter.notes["seed"]} if adapter else {}


def _score(stage: Stage, records: "pa.Table", adapter: Artifact | None) -> Rows:
    import pyarrow as pa

    with stage.adapted(state=adapter_state(stage.lake, adapter) if adapter else None) as peft_model:
        columns, means = score_records(stage, peft_model, records)
    return Rows(pa.table({"id": records["id"], **columns}), {**means, **seed_note(adapter)})


def score_records(stage: Stage, peft_model: "PeftModel", table: "pa.Table") -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns and the means of the metrics over n held-out records.

    Columns: mean_log_prob float64 [n], nats per token (for pairs: of the wanted completion); margin [n], null for plain
    records; prediction and exact_match, null where a record has no answer; unwanted_answer, whether the prediction has
    the unwanted completion's answer, null where that is not told; choice_correct, null where it has no choices.

    Means: of `metrics.held_out`, exact_match, unwanted_avoided (the share of unwanted_answer that is false) and
    choice_accuracy (each None where no record has the column) and the number of records.
    """
    import numpy as np
    import pyarrow as pa

    from prism_assets.corpus.token_tables import prompt_tokens
    from prism_assets.evaluation.answers import exact_match, gives_unwanted_answer
    from prism_assets.evaluation.metrics import held_out
    from prism_assets.sft.generation import generate, pad_token_id

    settings, tokenizer = stage.settings, stage.model.tokenizer()
    records = target_set(table)
    engine = gradient_engine(stage, peft_model)
    log_probs = engine.mean_log_probs(records.examples)
    chosen = log_probs[: records.size]
    margins = records.scores(log_probs) if records.pairs else None
    means: dict[str, Any] = {**held_out(chosen, margins), "exact_match": None, "records": records.size}
    rejected = table["rejected"].to_pylist()
    predictions: list[str | None] = [None] * records.size
    matches: list[bool | None] = [None] * records.size
    unwanted: list[bool | None] = [None] * records.size
    answers = table["answers"].to_pylist()
    asked = [position for position, one in enumerate(answers) if one]
    if asked:
        generated = generate(
            peft_model,
            [prompt_tokens(records.examples[position]) for position in asked],
            pad_token_id=pad_token_id(tokenizer),
            eos_token_id=list(encoder_of(stage).stop_token_ids),
            max_new_tokens=settings.evaluation.max_new_tokens,
            batch_size=settings.evaluation.batch_size,
        )
        for position, tokens in zip(asked, generated, strict=True):
            prediction = cast("str", tokenizer.decode(tokens, skip_special_tokens=True))
            predictions[position], matches[position] = prediction, exact_match(prediction, answers[position])
            if rejected[position] is not None:
                unwanted[position] = gives_unwanted_answer(prediction, rejected[position], answers[position])
        means["exact_match"] = float(np.mean([bool(matches[position]) for position in asked]))
    told = [one for one in unwanted if one is not None]
    means["unwanted_avoided"] = 1 - float(np.mean(told)) if told else None
    chosen_right = _choices(stage, engine, table, Judged(records.examples, log_probs))
    judged = [one for one in chosen_right if one is not None]
    means["choice_accuracy"] = float(np.mean(judged)) if judged else None
    columns = {
        "mean_log_prob": pa.array(chosen, pa.float64()),
        "margin": pa.array(margins, pa.float64()) if margins is not None else pa.nulls(records.size, pa.float64()),
        "prediction": pa.array(predictions, pa.string()),
        "exact_match": pa.array(matches, pa.bool_()),
        "unwanted_answer": pa.array(unwanted, pa.bool_()),
        "choice_correct": pa.array(chosen_right, pa.bool_()),
    }
    return columns, means


class Judged(NamedTuple):
    """Tokenised examples and their mean log-probabilities."""

    examples: "Sequence[TokenizedExample]"
    mean_log_probs: "np.ndarray"


def _choices(stage: Stage, engine: "GradientEngine", table: "pa.Table", judged: Judged) -> list[bool | None]:
    """Whether each record's own completion is the likeliest of its choices; None where it has none, or where one of
    them is too long for `max_length`. `judged`: the records themselves, which are not run again."""
    import numpy as np

    from prism_assets.corpus.records import messages_from_json
    from prism_assets.corpus.template import Untokenizable
    from prism_assets.corpus.token_tables import choices_of
    from prism_assets.evaluation.metrics import choice_correct

    encoder = encoder_of(stage)
    found: list[bool | None] = [None] * table.num_rows
    options, places = [], []
    rows = zip(table["messages"].to_pylist(), table["completion"].to_pylist(), choices_of(table), strict=True)
    for position, (messages, completion, choices) in enumerate(rows):
        others = [one for one in choices if one != completion]
        if not others:
            continue
        try:
            encoded = encoder.encode_options(messages_from_json(messages), others)
        except Untokenizable as error:
            stage.log.warning(f"held-out record on line {table['line'][position]}: choices not judged: {error.reason}")
            continue
        own, *rest = encoded
        known = None
        if _equal(own, judged.examples[position]):
            known = float(judged.mean_log_probs[position] * own.loss_mask.sum())
            encoded = rest
        places.append((position, known, len(options), len(encoded), choices.index(completion)))
        options += encoded
    if options:
        tokens = np.array([one.loss_mask.sum() for one in options])
        sums = engine.mean_log_probs(options) * tokens
        for position, known, start, count, right in places:
            values = sums[start : start + count].tolist()
            # The record's own completion is encoded first; it goes back to its place among the choices.
            first, *others = values if known is None else [known, *values]
            found[position] = choice_correct([*others[:right], first, *others[right:]], right)
    return found


def _equal(one: "TokenizedExample", other: "TokenizedExample") -> bool:
    import numpy as np

    same = np.array_equal(one.input_ids, other.input_ids)
    return same and np.array_equal(one.loss_mask, other.loss_mask)
