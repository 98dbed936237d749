"""`prism export --format`: one folder that another tool reads as it is, `<folder>/<format>/`.

Of what the lake shows, with or without an adapter: a data file in the format's own schema, a configuration where the
tool has one, and a README.md; `adapter/` where one was trained on exactly these rows.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from prism_assets.export.formats.axolotl import AXOLOTL
from prism_assets.export.formats.format import Format
from prism_assets.export.formats.handover import handover_of
from prism_assets.export.formats.llama_factory import LLAMA_FACTORY
from prism_assets.export.formats.names import FormatName
from prism_assets.export.formats.openai import OPENAI
from prism_assets.export.formats.parquet import PARQUET_FORMAT
from prism_assets.export.formats.readme import ADAPTER, readme
from prism_assets.export.formats.sharegpt import SHAREGPT
from prism_assets.export.formats.trl import TRL
from prism_assets.export.places import check_free, make_folder, put
from prism_assets.stage import Stage

FORMATS: Mapping[FormatName, Format] = {
    "trl": TRL,
    "axolotl": AXOLOTL,
    "llama-factory": LLAMA_FACTORY,
    "openai": OPENAI,
    "sharegpt": SHAREGPT,
    "parquet": PARQUET_FORMAT,
}


class HandedOver(NamedTuple):
    """The folder that was written, and what is in it."""

    folder: Path
    what: str  # "selected"; of a removal "kept"
    rows: int
    completion_tokens: int
    has_adapter: bool


def hand_over(
    stage: Stage, target: str, strategy: str, name: FormatName, folder: Path, *, force: bool = False
) -> HandedOver:
    """Write `<folder>/<name>/`; with `force` an earlier one is replaced.

    Raises CannotExport where the lake shows no selection, or one of other settings; where rows hold what the format has
    no words for; and where something else is in the way.
    """
    made, place = FORMATS[name], folder / name
    check_free(place, (*made.files, "README.md", ADAPTER), force)
    handover = handover_of(stage, target, strategy)

    def write(draft: Path) -> None:
        made.write(draft, handover)
        (draft / "README.md").write_text(readme(handover, name, made), encoding="utf-8")
        for file, path in handover.adapter_files.items():
            (draft / ADAPTER).mkdir(exist_ok=True)
            shutil.copyfile(path, draft / ADAPTER / file)

    existed = folder.exists()
    make_folder(folder)
    try:
        put(place, write)
    finally:
        if not existed and not any(folder.iterdir()):
            folder.rmdir()
    return HandedOver(
        place, handover.what, len(handover.rows), handover.completion_tokens, handover.adapter is not None
    )
