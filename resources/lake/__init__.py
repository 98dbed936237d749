"""The lake: what was computed, published once, found by what it was made from."""

from prism_assets.resources.lake.hashing import hash_file, hash_folder, hash_rows, hash_table, hash_tensors
from prism_assets.resources.lake.lake import Lake
from prism_assets.resources.lake.recipe import (
    Artifact,
    Content,
    Folder,
    Recipe,
    Reference,
    Rows,
    Tensors,
    digest,
    references,
)
from prism_assets.resources.lake.spool import Spool
from prism_assets.resources.lake.verification import damaged_among, verify
from prism_assets.resources.lake.views import CatalogAdditions

__all__ = [
    "Artifact",
    "CatalogAdditions",
    "Content",
    "Folder",
    "Lake",
    "Recipe",
    "Reference",
    "Rows",
    "Spool",
    "Tensors",
    "damaged_among",
    "digest",
    "hash_file",
    "hash_folder",
    "hash_rows",
    "hash_table",
    "hash_tensors",
    "references",
    "verify",
]
