"""What every mapping of `prism.yaml` is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of `prism.yaml`. The descriptions of its fields are shown in docs/settings.md."""

    # Defaults are validated too, so that a default of 32 and a given 32 are the same float in a fingerprint.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
