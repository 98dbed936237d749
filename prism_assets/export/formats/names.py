"""The names of the formats: all that the command line needs before it is run."""

from typing import Literal, get_args

FormatName = Literal["trl", "axolotl", "llama-factory", "openai", "sharegpt", "parquet"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)
