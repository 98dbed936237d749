import hashlib
import json
import os
import re
import time
import unicodedata
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_assets.corpus.inbox import scan, shard_key


def put(path, content=b'{"a": 1}\n', age=3600.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def reasons(found, folder):
    return {str(path.relative_to(folder)): reason for path, reason in found.ignored}


def test_a_shard_is_named_by_its_file_and_its_content(tmp_path):
    path = put(tmp_path / "sub" / "pool one.jsonl.gz", b"xyz")
    (file,) = scan(tmp_path).files
    digest = hashlib.sha256(b"xyz").hexdigest()
    assert file == (f"pool_one-{digest[:12]}", path, 3, digest, True)
    put(path, b"xyZ")
    (edited,) = scan(tmp_path).files
    assert edited.key != file.key and edited.key.startswith("pool_one-")


def test_what_is_no_data_file_is_reported_and_hidden_files_are_passed_over(tmp_path):
    for name in (
        "a.jsonl",
        "b.txt",
        "c.jsonl.part",
        "d.TMP",
        "e.jsonl~",
        ".hidden.jsonl",
        ".git/f.jsonl",
        "README",
    ):
        put(tmp_path / name)
    put(tmp_path / "empty.jsonl", b"")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(tmp_path / "pipe.jsonl")
    found = scan(tmp_path)
    assert [file.path.name for file in found.files] == ["a.jsonl"]
    ignored = reasons(found, tmp_path)
    assert set(ignored) == {
        "b.txt",
        "c.jsonl.part",
        "d.TMP",
        "e.jsonl~",
        "README",
        "empty.jsonl",
        "gone.jsonl",
        "loop",
        "pipe.jsonl",
    }
    assert "known are .jsonl" in ignored["b.txt"] and "partial" in ignored["c.jsonl.part"]
    assert ignored["empty.jsonl"] == "empty" and "link to a folder" in ignored["loop"]
    assert "regular" in ignored["pipe.jsonl"] and "link to nothing" in ignored["gone.jsonl"]


def test_a_link_out_of_the_inbox_is_followed_only_where_it_is_allowed(tmp_path):
    inbox = tmp_path / "inbox"
    secret = put(tmp_path / "secret.jsonl", b"secret")
    inside = put(inbox / "sub" / "a.jsonl", b"inside")
    (inbox / "b.jsonl").symlink_to(inside)
    (inbox / "c.jsonl").symlink_to(secret)
    (inbox / "d.jsonl").symlink_to(tmp_path / "elsewhere")
    (inbox / "folder").symlink_to(tmp_path)
    found = scan(inbox)
    assert [file.path.name for file in found.files] == ["a.jsonl", "b.jsonl"]
    ignored = reasons(found, inbox)
    assert set(ignored) == {"c.jsonl", "d.jsonl", "folder"}
    assert all("leads out of the inbox" in why and "candidates.follow_links" in why for why in ignored.values())
    allowed = scan(inbox, follow_links=True)
    assert {file.path.name: file.sha256 for file in allowed.files}["c.jsonl"] == hashlib.sha256(b"secret").hexdigest()
    assert "link to a folder" in reasons(allowed, inbox)["folder"]


def test_an_inbox_that_is_a_link_itself_is_the_users_own(tmp_path):
    put(tmp_path / "elsewhere" / "a.jsonl")
    (tmp_path / "inbox").symlink_to(tmp_path / "elsewhere")
    found = scan(tmp_path / "inbox")
    assert [file.path.name for file in found.files] == ["a.jsonl"] and not found.ignored


def test_a_link_that_takes_the_place_of_a_file_is_not_hashed(tmp_path, monkeypatch):
    from prism_assets.corpus import inbox as module

    path = put(tmp_path / "inbox" / "a.jsonl")
    put(tmp_path / "secret", b"secret")
    inspect = module._inspect

    def exchanged(found, *more):
        path.unlink()
        path.symlink_to(tmp_path / "secret")
        return inspect(found, *more)

    monkeypatch.setattr(module, "_inspect", exchanged)
    found = scan(tmp_path / "inbox")
    assert not found.files and "leads out of" in found.ignored[0].reason


def test_equal_files_of_one_name_are_one_shard_and_of_two_names_two(tmp_path):
    put(tmp_path / "b" / "x.jsonl")
    first = put(tmp_path / "a" / "x.jsonl", age=0)
    put(tmp_path / "y.jsonl")
    put(tmp_path / "c" / "x.jsonl", b"other")
    found = scan(tmp_path, at_rest_seconds=60)
    assert [file.key.split("-")[0] for file in found.files] == ["x", "x", "y"]
    same = next(file for file in found.files if file.path == first)
    assert same.settled  # its content is whole elsewhere
    assert reasons(found, tmp_path) == {"b/x.jsonl": f"the same name and content as {first}"}


def test_a_file_is_settled_once_it_has_rested(tmp_path):
    put(tmp_path / "new.jsonl", b"1", age=3)
    put(tmp_path / "old.jsonl", b"2", age=30)
    assert {f.path.stem: f.settled for f in scan(tmp_path, at_rest_seconds=10).files} == {
        "new": False,
        "old": True,
    }
    assert all(file.settled for file in scan(tmp_path, at_rest_seconds=1).files)


def test_a_modification_time_in_the_future_does_not_keep_a_file_from_settling(tmp_path):
    put(tmp_path / "a.jsonl", age=-3600)
    assert not scan(tmp_path, at_rest_seconds=60).files[0].settled  # arrived just now
    time.sleep(0.05)
    assert scan(tmp_path, at_rest_seconds=0.02).files[0].settled


def test_hashes_are_computed_again_only_for_changed_files(tmp_path, monkeypatch):
    folder, cache = tmp_path / "inbox", tmp_path / "state" / "cache.json"
    for name in "abc":
        put(folder / f"{name}.jsonl", name.encode())
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: hashed.append(file.name) or digest(file, kind))
    first = scan(folder, cache)
    assert len(hashed) == 3
    assert scan(folder, cache) == first and len(hashed) == 3
    put(folder / "b.jsonl", b"B")
    (folder / "c.jsonl").unlink()
    second = scan(folder, cache)
    assert len(hashed) == 4 and hashed[-1].endswith("b.jsonl")
    assert {f.sha256 for f in second.files} == {hashlib.sha256(content).hexdigest() for content in (b"a", b"B")}
    assert sorted(os.path.basename(name) for name in json.loads(cache.read_text())) == ["a.jsonl", "b.jsonl"]
    assert os.listdir(cache.parent) == ["cache.json"]


def test_a_file_that_may_still_change_unseen_is_not_remembered(tmp_path):
    folder, cache = tmp_path / "inbox", tmp_path / "cache.json"
    path = put(folder / "a.jsonl", b"one", age=0)
    status = path.stat()
    scan(folder, cache, at_rest_seconds=0)
    path.write_bytes(b"two")  # the same size, within one tick of the clock
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert scan(folder, cache, at_rest_seconds=0).files[0].sha256 == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"PATH": [1, 2]}', '{"PATH": [8, 1, 5]}', "\xff"])
def test_a_damaged_cache_costs_only_time_and_other_folders_keep_theirs(tmp_path, content):
    path, cache = put(tmp_path / "in" / "a.jsonl"), tmp_path / "cache.json"
    cache.write_text(content.replace("PATH", str(path)), encoding="latin-1")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert scan(path.parent, cache).files[0].sha256 == expected
    scan(put(tmp_path / "in2" / "b.jsonl").parent, cache)
    assert len(json.loads(cache.read_text())) == 2


def test_an_inbox_that_is_none_is_an_error_with_advice(tmp_path):
    with pytest.raises(FileNotFoundError, match="create it"):
        scan(tmp_path / "none")
    with pytest.raises(NotADirectoryError, match="name the folder"):
        scan(put(tmp_path / "a.jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_reported(tmp_path):
    put(tmp_path / "a.jsonl").chmod(0)
    assert "cannot be read" in scan(tmp_path).ignored[0].reason


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pool.jsonl", "pool"),
        ("v1.2-final.parquet", "v1.2-final"),
        ("a...b|c,d\ne.jsonl.zst", "a.b_c_d_e"),
        ("..-_.jsonl", "shard"),
        ("数据.jsonl", "数据"),
        ("e\u0301te\u0301 2026.jsonl", "été_2026"),
        ("данные|a\u202e.jsonl", "данные_a"),
        ("\u202e…!.jsonl", "shard"),
        ("हिन्दी ไทยที่.jsonl", "हिन्दी_ไทยที่"[:17]),
        ("数" * 300 + ".jsonl", "数" * 17),
        ("x" * 300 + ".jsonl", "x" * 60),
    ],
)
def test_shard_names(name, expected):
    assert shard_key(name, "0123456789abcdef") == f"{expected}-0123456789ab"


@given(st.text(max_size=80), st.sampled_from([".jsonl", ".jsonl.gz", ".parquet", ""]))
def test_any_file_name_gives_a_key_fit_for_a_partition_and_a_path(stem, extension):
    key = shard_key(stem + extension, "f" * 64)
    assert re.fullmatch(r"\S{1,60}-f{12}", key) and key[0] not in "_.-" and ".." not in key
    assert all(one in "_.-" or unicodedata.category(one)[0] in "LNM" for one in key)
    assert len(quote(key)) <= 180  # it is a part of file names, quoted
