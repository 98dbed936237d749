"""Opening what others put into a folder: links, pipes, devices, and links that are exchanged at the wrong moment."""

import os
import socket
from pathlib import Path

import pytest

from prism_assets.resources import regular_files
from prism_assets.resources.regular_files import LeadsOutside, open_regular


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "data").write_bytes(b"data")
    (tmp_path / "secret").write_bytes(b"secret")
    return folder


def content(path: Path, inside: Path | None) -> bytes:
    with open_regular(path, inside) as file:
        return file.read()


def test_a_file_and_links_to_it_that_stay_inside_are_opened(inbox):
    (inbox / "link").symlink_to(inbox / "sub" / "data")
    (inbox / "folder").symlink_to("sub")
    for path in (inbox / "sub" / "data", inbox / "link", inbox / "folder" / "data", inbox / "sub/../sub/data"):
        assert content(path, inbox) == content(path, None) == b"data"


def test_the_folder_itself_may_be_reached_by_a_link(inbox, tmp_path):
    (tmp_path / "to inbox").symlink_to(inbox)
    assert content(tmp_path / "to inbox" / "sub" / "data", tmp_path / "to inbox") == b"data"
    assert content(inbox / "sub" / "data", tmp_path / "to inbox") == b"data"


def test_what_lies_outside_is_not_opened(inbox, tmp_path):
    (inbox / "link").symlink_to(tmp_path / "secret")
    (inbox / "relative").symlink_to("../secret")
    (inbox / "chain").symlink_to("link")
    (inbox / "up").symlink_to(tmp_path)
    (tmp_path / "inbox2").mkdir()
    (tmp_path / "inbox2" / "secret").write_bytes(b"secret")
    (inbox / "neighbour").symlink_to(tmp_path / "inbox2" / "secret")
    (inbox / "device").symlink_to("/dev/zero")
    for name in ("link", "relative", "chain", "up/secret", "neighbour", "device", "../secret"):
        with pytest.raises(LeadsOutside):
            open_regular(inbox / name, inbox)
    assert content(inbox / "link", None) == b"secret"


@pytest.mark.parametrize("exchanged", ["file", "folder"])
def test_a_link_that_takes_the_place_of_what_was_checked_is_not_followed(inbox, tmp_path, monkeypatch, exchanged):
    (tmp_path / "data").write_bytes(b"secret")
    realpath = os.path.realpath

    def resolved_and_then_exchanged(path, **options):
        found = realpath(path, **options)
        if str(path).endswith("data"):
            (inbox / "sub" / "data").unlink(missing_ok=True)
            if exchanged == "file":
                (inbox / "sub" / "data").symlink_to(tmp_path / "data")
            else:
                (inbox / "sub").rmdir()
                (inbox / "sub").symlink_to(tmp_path)
        return found

    monkeypatch.setattr(regular_files.os.path, "realpath", resolved_and_then_exchanged)
    with pytest.raises(LeadsOutside):
        open_regular(inbox / "sub" / "data", inbox)


@pytest.mark.parametrize("inside", [True, False])
def test_pipes_sockets_devices_and_folders_are_refused_at_once(inbox, monkeypatch, inside):
    os.mkfifo(inbox / "pipe")  # opening it would wait for somebody who writes
    monkeypatch.chdir(inbox)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")
    for path in (inbox / "pipe", inbox / "socket", inbox / "sub"):
        with pytest.raises(OSError):
            open_regular(path, inbox if inside else None)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(Path("/dev/zero"))
    with pytest.raises(FileNotFoundError):
        open_regular(inbox / "none", inbox)


def test_no_descriptor_is_left_open(inbox, tmp_path):
    (inbox / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(inbox / "pipe")
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        for name in ("link", "pipe", "sub", "none", "sub/none"):
            with pytest.raises(OSError):
                open_regular(inbox / name, inbox)
        content(inbox / "sub" / "data", inbox)
    assert len(os.listdir("/dev/fd")) == before
