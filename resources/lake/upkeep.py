"""What lies in a lake's store beside of what it shows: for `prism gc`, which knows tables and heads and no layout.

A key names a file or folder of the store; nobody else reads anything into it.
"""

from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from prism_assets.resources.lake.lake import SUFFIXES, Lake
from prism_assets.resources.lake.recipe import FINGERPRINT, Artifact
from prism_assets.resources.store import DRAFTS

_DAMAGED = ".damaged"


def keys_of(lake: Lake, table: str, fingerprint: str) -> tuple[str, ...]:
    """The file or folder of an artefact and what lies beside it, the artefact itself first."""
    found = [key for key in lake.store.keys(f"artifacts/{table}/{fingerprint}*") if not key.endswith(_DAMAGED)]
    return tuple(sorted(found, key=lambda key: (_is_attached(key), key)))


def file_of(lake: Lake, table: str, fingerprint: str) -> Path | None:
    """Where an artefact lies, readable or not; None where there is nothing, or only what lay beside it."""
    itself = next((key for key in keys_of(lake, table, fingerprint) if not _is_attached(key)), None)
    return None if itself is None else path_of(lake, itself)


def path_of(lake: Lake, key: str) -> Path:
    """The file or folder of a key, to be named to the user."""
    return lake.store.local(key)


def size_of(lake: Lake, *keys: str) -> int:
    """Bytes of all files at the keys."""
    return sum(lake.store.size(key) for key in keys)


def changed_at(lake: Lake, artifact: Artifact) -> float:
    """When anything of an artefact was last written, seconds since the epoch."""
    return lake.store.changed(artifact.key)


def discard(lake: Lake, key: str) -> None:
    """Remove what is at a key: it leaves by a rename, so nobody sees half of it."""
    lake.store.discard(key)


def leftovers(lake: Lake, before: float, needed: Collection[str]) -> Iterator[str]:
    """Keys of what is no artefact: drafts of killed runs, attachments without their table and what is remembered of
    artefacts other than the `needed` fingerprints, if older than `before` (seconds since the epoch); and every damaged
    file."""
    store = lake.store
    drafts = [*store.keys(f"{DRAFTS}/*"), *store.keys("heads/*/*/.*"), *store.keys("cache/**/.*")]
    attached = [key for key in store.keys("artifacts/*/*") if _is_attached(key)]
    alone = [key for key in attached if not store.exists(f"{key.removesuffix(_suffix(key))}.parquet")]
    remembered = [key for key in store.files("cache/*/**/*") if FINGERPRINT.match(_name(key))]
    of_others = [key for key in remembered if _name(key) not in needed]
    old = [key for key in (*drafts, *alone, *of_others) if store.changed(key) < before]
    yield from sorted([*old, *store.keys(f"artifacts/*/*{_DAMAGED}")])


def _is_attached(key: str) -> bool:
    """Whether a file lies beside a table, under its fingerprint and a suffix that no artefact has."""
    stem = _name(key).removesuffix(_suffix(key))
    return _suffix(key) not in (*SUFFIXES, _DAMAGED) and FINGERPRINT.match(stem) is not None


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _suffix(key: str) -> str:
    return PurePosixPath(key).suffix
