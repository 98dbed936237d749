"""Sections of `prism.yaml` that protect: what a file may take, and who the UI answers."""

import re
from typing import Annotated

from pydantic import AfterValidator, ByteSize, Field

from prism_assets.settings.section import Section

_HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9a-fA-F:]+")


class LimitSettings(Section):
    """What a file of records may take; what exceeds it, a record or the whole file (`file_readable`), is rejected."""

    record: ByteSize = Field(
        default=ByteSize(16_000_000), ge=1000, description="Bytes of a line, or of the texts of a row."
    )
    expansion: int = Field(
        default=200,
        ge=1,
        description="Times its size that a compressed or Parquet file may expand to, where that is more than 64 MiB.",
    )
    expanded: ByteSize = Field(
        default=ByteSize(32_000_000_000), ge=1, description="Bytes that a compressed or Parquet file may expand to."
    )
    blank_lines: int = Field(default=1_000_000, ge=0, description="Blank lines in a file.")
    depth: int = Field(default=64, ge=2, le=500, description="Arrays and objects of a record within each other.")
    rejects: int = Field(default=1_000_000, ge=0, description="Rejected records of a file, repetitions included.")


def _host(name: str) -> str:
    if not _HOST.fullmatch(name):
        raise ValueError("a host is a name or an IP address, without scheme, port and path, such as prism.example.org")
    return name


class UiSettings(Section):
    """`prism ui`; docs/security.md says what it is safe from."""

    allowed_hosts: tuple[Annotated[str, AfterValidator(_host)], ...] = Field(
        default=(),
        description="Names, beside those of this machine, under which browsers reach the UI, such as that of a proxy "
        "with a log-in. Requests for other hosts are refused.",
    )
