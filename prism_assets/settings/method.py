"""The sections of `prism.yaml` that say what is aimed at and how rows are ranked."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from prism_assets.settings.budget import Budget, parse_budget
from prism_assets.settings.section import ColumnName, Section

GivenBudget = Annotated[Budget, BeforeValidator(parse_budget)]
RowScale = Literal["unit", "mean", "sum"]
Rerank = float | Literal["all"]


class TargetSettings(Section):
    """One capability (or repair) to select for: a few target examples and a held-out evaluation file."""

    examples: Path = Field(description="The file of target examples, plain or pairs.")
    eval: Path = Field(description="The file of held-out records that adapters are evaluated on.")
    columns: dict[ColumnName, str] = Field(
        default={},
        exclude=True,
        description="By the name that is expected (`prompt`, `completion`, `rejected`, …) the files' own column.",
    )
    max_rejected: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="The share of the records of either file that may be rejected, duplicates not counted; more stops "
        "the run before any training.",
    )
    use: Literal["keep", "remove"] = Field(
        default="keep",
        description="keep: the top of the ranking is selected to fine-tune on; remove: the target names a behaviour to "
        "get rid of: the rows that raise the preference for the unwanted answers most are taken out, and the rest is "
        "what is fine-tuned on. Records name the wanted answer as wanted in both.",
    )
    budget: GivenBudget | None = Field(
        default=None,
        description="How much is selected, or removed, for this target; a share is one of the mixture where one is "
        "named; null: selection.budget.",
    )
    mixture: str | None = Field(
        default=None,
        description="With use: remove, the `source` of the candidates that rows are removed from; null: all of them.",
    )
    label: str | None = Field(
        default=None,
        description="With use: remove, a field of the candidates' records that says whether a row is harmful (true or "
        "false, 1 or 0), for judging alone: no ranking sees it. The report then says how well each ranking finds such "
        "rows, and the strategy oracle removes exactly them.",
    )
    label_values: tuple[str, ...] = Field(
        default=(), description="The values of `label` that are harmful, where it is not true or false."
    )
    anchors: Literal["given", "choices", "generated", "shuffled", "none"] | None = Field(
        default=None,
        description="Where the unwanted answer of a target example without one comes from: choices (each other option "
        "of its `choices`), generated (the warmed-up model's own answer), shuffled (the answer to another example of "
        "the file); an answer of its own is kept. given: every example has its own; none: unwanted answers are left "
        "out. null: given where the file's records have them, else none.",
    )

    @model_validator(mode="after")
    def _a_mixture_is_removed_from(self) -> "TargetSettings":
        if self.mixture is not None and self.use != "remove":
            raise ValueError("mixture has a meaning with use: remove only; leave it out, or set use: remove")
        if self.label is not None and self.use != "remove":
            raise ValueError("label has a meaning with use: remove only; leave it out, or set use: remove")
        if self.label_values and self.label is None:
            raise ValueError("label_values needs label, the field whose values they are")
        if self.use == "remove" and self.anchors == "none":
            raise ValueError("use: remove needs pairs of a wanted and an unwanted answer: leave anchors: none out")
        return self


class PreferenceSettings(Section):
    """How the model's preference weights the target examples."""

    temperature: float | None = Field(
        default=None,
        gt=0,
        description="The temperature τ of the weights; null: 1, as published (prism-sigmoid: a robust scale of the "
        "margins of pairs).",
    )
    score: Literal["mean", "sum"] = Field(
        default="mean",
        description="The score of a target example: the mean of its tokens' log-probabilities in nats, or their sum "
        "(plain targets only).",
    )
    groups: Literal["separate", "pooled"] = Field(
        default="separate",
        description="separate: the target examples of each `group` make a direction of their own, and these are "
        "brought to unit length and added, so that no group takes the sum; pooled: all make one, whatever their group.",
    )
    probe_step: float = Field(
        default=0.02,
        gt=0,
        description="The measured step along PRISM has the length at which J is predicted to rise by this share.",
    )


class CurvatureSettings(Section):
    """How directions are corrected for curvature: t becomes (H + λI)⁻¹ t. The index stays as it is."""

    kind: Literal["none", "adam", "fisher", "datainf", "ekfac"] = Field(
        default="none",
        description="H: adam (the diagonal of the warm-up's AdamW; for features.optimizer sgd), fisher (the second "
        "moment of the warm-up sample's unit rows), datainf (its closed form, parameter by parameter) or ekfac "
        "(diagonal in the eigenbases of Kronecker factors; for features.optimizer sgd); none: no correction.",
    )
    damping: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description="λ: of fisher a share of the trace, of datainf of the mean squared entry, of ekfac of the mean "
        "eigenvalue; auto: of fisher and ekfac the one under which one half of the sample serves the other best, of "
        "datainf 0.1. Adam has none.",
    )


class SelectionSettings(Section):
    """How the ranking is cut."""

    budget: GivenBudget = Field(
        default=Budget(kind="share", amount=0.05),
        description="How much is selected: 500 (rows), 5% (of canonical live rows) or 200k tokens (of completions).",
    )
    seed: int = Field(default=0, description="The seed of the strategy `random`.")
    row_scale: RowScale = Field(
        default="unit",
        description="How long a candidate's gradient counts in strategies with one direction: unit (its cosine, as "
        "LESS), mean (as long as the gradient of its mean loss), or sum (of its summed loss, as PRISM is published); "
        "the last two with features.optimizer sgd or adam.",
    )
    rerank: Annotated[float, Field(ge=0)] | Literal["all"] = Field(
        default=0.0,
        description="Strategies with one direction score the top of their ranking again without a sketch: so many "
        "budgets' worth of rows; all: every row, in the gradient pass that makes its features where the directions are "
        "known by then, else in one more pass for all of them; 0: off.",
    )
