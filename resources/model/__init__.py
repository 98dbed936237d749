"""The language model: its identity, and loading it once a process."""

from prism_assets.resources.model.identity import ModelIdentity
from prism_assets.resources.model.language_model import LanguageModel

__all__ = ["LanguageModel", "ModelIdentity"]
