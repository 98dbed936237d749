"""What the passes of a model cost, from about a second of work of each kind on real rows, and what memory they take."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np

    from prism_assets.corpus.encoder import TokenizedExample
    from prism_assets.gradients.engine import GradientEngine

_PROMPT_TOKENS = 8  # of the prompts that generation is measured with: reading long ones is a forward pass
_NEW_TOKENS = 4


class Rate(NamedTuple):
    """Seconds of the clock and of the processors for one token, or for one step."""

    seconds: float
    cpu_seconds: float


class Rates(NamedTuple):
    """What was measured."""

    gradient: Rate  # a token of a gradient pass: per-example gradients, preconditioned and sketched
    training: Rate  # a token of a weighted gradient, as training and directions take it
    forward: Rate  # a token of a forward pass
    generation: Rate  # a new token of one prompt, in a batch of the size that the settings name
    step: Rate  # an optimiser step beside its gradients


class Memory(NamedTuple):
    """Bytes on the device where the model runs."""

    device: str
    model: int  # the base model's tensors
    held: int  # what the process holds with the model loaded
    loading: int  # what it holds beside that while it loads the model
    planned: float  # by the largest batch, with batches as they are planned
    least: float  # by the longest example alone, its activations recomputed
    allowed: int  # for the process: execution.memory, or what is free minus a tenth

    @property
    def expected(self) -> float:
        """The peak: batches that do not fit are halved, and no further than to one example."""
        return max(self.held + self.loading, min(self.held + self.planned, max(self.allowed, self.smallest)))

    @property
    def smallest(self) -> float:
        """What the work cannot do without."""
        return self.held + self.least


class Measured(NamedTuple):
    """A model's costs."""

    rates: Rates | None  # None where the memory is not enough for anything
    memory: Memory
    parameters: int  # of the adapter


def measure(
    stage: Stage, examples: "Sequence[TokenizedExample]", prompts: "Sequence[np.ndarray]", *, rows: int, seconds: float
) -> Measured:
    """Run each kind of pass for about so many seconds on some of these examples, at least one batch of one.

    `examples` stand for the pool and hold its longest row; `prompts` are those that are generated from; `rows`: of the
    largest shard. Raises what the gradient engine and the model raise.
    """
    import torch

    from prism_assets.gradients.batching import tokens_read
    from prism_assets.gradients.memory import release_memory
    from prism_assets.reference.engine import gradient_engine

    with stage.adapted() as peft_model, torch.random.fork_rng(devices=[]):
        engine = gradient_engine(stage, peft_model)
        need = engine.memory_need([tokens_read(one) for one in examples])
        kept = _results(stage, engine, rows)
        generation = _generation_bytes(stage, engine, prompts)
        memory = _memory(stage, engine, max(need.planned + kept, generation), need.least + kept)
        rates = _rates(stage, engine, examples, prompts, seconds) if memory.smallest <= memory.allowed else None
        release_memory(stage.model.torch_device())
        return Measured(rates, memory, engine.num_parameters)


# -- time ---------------------------------------------------------------------------------------------------------


def _rates(
    stage: Stage,
    engine: "GradientEngine",
    examples: "Sequence[TokenizedExample]",
    prompts: "Sequence[np.ndarray]",
    seconds: float,
) -> Rates:
    import numpy as np
    import torch

    from prism_assets.gradients.preconditioner import Moments, Preconditioner
    from prism_assets.gradients.sketch import ExactFeatures, Sketch

    features = stage.settings.features
    if features.sketch_dim == "exact":
        sketch = ExactFeatures(engine.parameter_shapes)
    else:
        sketch = Sketch(features.sketch_dim, features.seed)
    # The moments of the warm-up may not be there yet; others of the same shapes cost the same.
    moments = {name: Moments(torch.zeros(shape), torch.ones(shape)) for name, shape in engine.parameter_shapes.items()}
    preconditioner = Preconditioner.build(features.optimizer, moments, step=1, betas=(0.9, 0.999), eps=1e-8)
    batches = _batches(stage, engine, examples)

    def gradient(batch: Any) -> None:
        engine.feature_rows(batch, sketch=sketch, preconditioner=preconditioner)

    def training(batch: Any) -> None:
        engine.weighted_gradient(batch, np.full(len(batch), 1 / len(batch)))

    return Rates(
        _rate(gradient, batches, seconds),
        _rate(training, batches, seconds),
        _rate(engine.mean_log_probs, batches, seconds),
        _generation(stage, engine, prompts, seconds),
        _step(engine),
    )


def _batches(
    stage: Stage, engine: "GradientEngine", examples: "Sequence[TokenizedExample]"
) -> "list[list[TokenizedExample]]":
    """The examples in the batches that the engine makes of them, those of different lengths in turn."""
    from prism_assets.gradients.batching import default_token_budget, plan_batches, tokens_read

    budget = stage.settings.features.token_budget or default_token_budget(engine.device)
    planned = plan_batches([tokens_read(one) for one in examples], budget)
    return [[examples[position] for position in planned[index]] for index in _spread(len(planned))]


def _spread(count: int) -> list[int]:
    """0 … count - 1 in an order whose first few are spread over all."""
    bits = max(count - 1, 1).bit_length()
    reversed_bits = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1, 2**bits))
    return [*(index for index in reversed_bits if index < count), 0]


def _rate(run: Callable[[Any], Any], batches: "list[list[TokenizedExample]]", seconds: float) -> Rate:
    """Seconds a token, over batches until so many seconds are gone. A batch that would take longer is cut."""
    short = [min((example for batch in batches for example in batch), key=lambda one: len(one.input_ids))]
    first = _timed(lambda: run(short))
    if first.seconds >= seconds:  # beside which what a first pass allocates is nothing
        return Rate(first.seconds / len(short[0].input_ids), first.cpu_seconds / len(short[0].input_ids))
    a_token = _timed(lambda: run(short)).seconds / len(short[0].input_ids)
    total, tokens = Rate(0.0, 0.0), 0
    for batch in batches:
        if tokens and total.seconds >= seconds:
            break
        rows = (seconds - total.seconds) / (a_token * len(batch[0].input_ids))
        part = batch[: max(1, int(rows))]
        took = _timed(lambda part=part: run(part))
        total = Rate(total.seconds + took.seconds, total.cpu_seconds + took.cpu_seconds)
        tokens += sum(len(example.input_ids) for example in part)
        a_token = total.seconds / tokens
    return Rate(total.seconds / tokens, total.cpu_seconds / tokens)


def _generation(stage: Stage, engine: "GradientEngine", prompts: "Sequence[np.ndarray]", seconds: float) -> Rate:
    """Of a new token: what more tokens cost beside one, for a batch of short prompts."""
    if not len(prompts):
        return Rate(0.0, 0.0)
    from prism_assets.sft.generation import generate, pad_token_id

    batch = [prompt[-_PROMPT_TOKENS:] for prompt in prompts[: stage.settings.evaluation.batch_size]]
    padding = pad_token_id(stage.model.tokenizer())

    def run(new: int) -> Rate:
        options = {"max_new_tokens": new, "pad_token_id": padding, "eos_token_id": None, "batch_size": len(batch)}
        return _timed(lambda: generate(engine.model, batch, **options))

    first = min(run(1), run(1))
    new = 1 + min(_NEW_TOKENS, stage.settings.evaluation.max_new_tokens)
    more = run(new)
    tokens = len(batch) * (new - 1)
    return Rate(
        max(more.seconds - first.seconds, 0.0) / tokens, max(more.cpu_seconds - first.cpu_seconds, 0.0) / tokens
    )


def _step(engine: "GradientEngine") -> Rate:
    """AdamW on copies of the adapter's parameters; the first step makes its moments and is not counted."""
    import torch

    copies = [parameter.detach().clone().requires_grad_() for parameter in engine.parameters.values()]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer = torch.optim.AdamW(copies)
    optimizer.step()
    return _timed(optimizer.step)


def _timed(run: Callable[[], Any]) -> Rate:
    from prism_assets.progress import wait_for_gpu

    wait_for_gpu()
    clock, processor = time.perf_counter(), time.process_time()
    run()
    wait_for_gpu()
    return Rate(time.perf_counter() - clock, time.process_time() - processor)


# -- memory -------------------------------------------------------------------------------------------------------


def _memory(stage: Stage, engine: "GradientEngine", planned: float, least: float) -> Memory:
    import psutil
    import torch

    from prism_assets.gradients.memory import MemoryLimit
    from prism_assets.quantized import state_bytes

    device = engine.device
    limit = MemoryLimit(device, stage.settings.execution.memory_limit)
    adapter = {id(parameter) for parameter in engine.parameters.values()}
    tensors = [*engine.model.parameters(), *engine.model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if id(tensor) not in adapter)
    size += state_bytes(engine.model)
    on_gpu = device.type == "cuda"
    held = torch.cuda.memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    # On a host the files stay mapped while tensors of another type are made of them; else they are the tensors.
    on_disk = stage.model_identity.parameters_on_disk
    loading = 0 if on_gpu or abs(size - on_disk) < 0.05 * size else on_disk
    return Memory(device.type, size, held, loading, planned, least, held + max(limit.free(), 0))


def _results(stage: Stage, engine: "GradientEngine", rows: int) -> float:
    """Bytes of what a stage keeps beside its batches: a block's rows, or a training's states."""
    from prism_assets.features.blocks import BLOCK_ROWS

    features, checkpoints = stage.settings.features, stage.settings.warmup.checkpoints
    dim = engine.num_parameters if features.sketch_dim == "exact" else features.sketch_dim
    # float32 rows of each checkpoint, then their unit rows beside float16 copies of all.
    block = min(rows, BLOCK_ROWS) * dim * (4 * checkpoints + 4 + 4 * checkpoints)
    # Gradient, its sum, two moments and the start; parameters and moments at each checkpoint.
    training = 4 * engine.num_parameters * (5 + 3 * checkpoints)
    return float(max(block, training)) if engine.device.type != "cuda" else 4.0 * engine.num_parameters * 4


def _generation_bytes(stage: Stage, engine: "GradientEngine", prompts: "Sequence[np.ndarray]") -> float:
    """Keys and values of a batch of the longest prompts with all their new tokens, and one layer's activations."""
    from prism_assets.gradients.memory import FIXED_BYTES

    if not len(prompts):
        return 0.0
    options, config = stage.settings.evaluation, engine.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * width
    longest = sorted((len(prompt) for prompt in prompts), reverse=True)[: options.batch_size]
    size = engine.layers[0].dtype.itemsize
    cached = 2 * config.num_hidden_layers * keys * size * (longest[0] + options.max_new_tokens)
    layer = size * longest[0] * (4 * config.hidden_size + 3 * (getattr(config, "intermediate_size", 0) or 0))
    return len(longest) * (cached + layer) + FIXED_BYTES
