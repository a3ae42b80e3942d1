"""Downloads that are cut: they go on where they were, and never mix two files."""

import json

import pytest
from file_server import AGAIN, CONTENT, HALF, OTHER, arrives, assert_whole, fails, ignore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import download as module
from data_prep.download import RemoteFile, download


def test_whole_file(server, tmp_path):
    seen = []
    path = tmp_path / "new" / "folder" / "file.bin"
    assert download(server.file(), path, lambda *progress: seen.append(progress)) == path
    assert_whole(path)
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)
    assert server.ranges == [None]


def test_without_published_figures(server, tmp_path):
    path = tmp_path / "file.bin"
    server.faults = [{"cut": HALF}]
    arrives(RemoteFile(server.url, None, None), path)
    assert server.ranges == [None, f"bytes={HALF}-"]


def test_empty_file(server, tmp_path):
    server.content = b""
    arrives(RemoteFile(server.url, None, None), tmp_path / "file.bin", b"")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 5000), max_size=12))
def test_any_cuts(server, tmp_path, cuts):
    """Wherever and however often the connection breaks, the file arrives, and no byte of it is sent twice."""
    content = CONTENT[:20_000]
    server.content, server.ranges[:] = content, []
    # No more connections in a row without a byte than are allowed.
    cuts = [cut or 1 for cut in cuts]
    server.faults = [{"cut": cut} for cut in cuts]
    path = tmp_path / "file.bin"
    arrives(server.file(content), path, content)
    path.unlink()
    begins = [sum(cuts[:number]) for number in range(len(cuts) + 1)]
    begins = [begin for begin in begins if begin < len(content)]
    assert server.ranges == [f"bytes={begin}-" if begin else None for begin in begins]


def test_goes_on_in_a_later_call(server, tmp_path):
    path = tmp_path / "file.bin"
    server.faults = [{"cut": HALF}] + [{"status": 503}] * module.ATTEMPTS
    fails(server.file(), path, "503 Service Unavailable", f"{HALF} bytes", AGAIN, kept=HALF)
    assert len(server.ranges) == module.ATTEMPTS
    seen = []
    server.faults.clear()
    download(server.file(), path, lambda *progress: seen.append(progress))
    assert_whole(path)
    assert server.ranges[-1] == f"bytes={HALF}-" and server.conditions[-1] == '"1"'
    assert seen[0] == (HALF, len(CONTENT))


def test_attempts_are_counted_anew_after_progress(server, tmp_path):
    some = [{"status": 503}] * (module.ATTEMPTS - 2)
    server.faults = [*some, {"cut": 1000}, *some, {"cut": 1000}, *some]
    arrives(server.file(), tmp_path / "file.bin")


def test_pauses_grow_and_begin_anew(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    server.faults = [{"status": 503}, {"status": 503}, {"cut": 1000}, {"status": 503}]
    download(server.file(), tmp_path / "file.bin", ignore)
    assert pauses == [0.001, 0.002, 0.001, 0.002]


@pytest.mark.parametrize("sent", [HALF, 0])
def test_truncating_server(server, tmp_path, sent):
    server.faults = [{"cut": sent}] + [{"cut": 0}] * module.ATTEMPTS
    fails(server.file(), tmp_path / "file.bin", f"ended at {sent} of {len(CONTENT)} bytes", AGAIN, kept=sent)


def test_server_that_ignores_ranges(server, tmp_path):
    server.faults = [{"cut": HALF}, {"ignore_range": True}]
    arrives(server.file(), tmp_path / "file.bin")
    assert server.ranges == [None, f"bytes={HALF}-"]


def test_server_that_ignores_ranges_and_always_cuts(server, tmp_path):
    server.faults = [{"cut": HALF, "ignore_range": True}] * 99
    fails(server.file(), tmp_path / "file.bin", f"ended at {HALF}", kept=HALF)
    assert len(server.ranges) == module.ATTEMPTS


@pytest.mark.parametrize("ignore_condition", [False, True])
@pytest.mark.parametrize("same_length", [True, False])
def test_file_that_changes_between_calls(server, tmp_path, ignore_condition, same_length):
    """Also where the server sends the rest of the new file: the parts of two files never come together."""
    path = tmp_path / "file.bin"
    server.faults = [{"cut": HALF}] + [{"status": 503}] * module.ATTEMPTS
    published = RemoteFile(server.url, None, None)
    fails(published, path, kept=HALF)
    server.content = OTHER if same_length else OTHER[:-7]
    server.headers = {"ETag": '"2"'}
    server.faults = [{"ignore_condition": ignore_condition}]
    arrives(published, path, server.content)
    assert server.ranges[module.ATTEMPTS :] == [f"bytes={HALF}-", None][: 2 if ignore_condition else 1]


def test_file_of_another_length_under_the_same_tag(server, tmp_path):
    path = tmp_path / "file.bin"
    server.faults = [{"cut": HALF}, {"status": 404}]
    published = RemoteFile(server.url, None, None)
    fails(published, path, kept=HALF)
    server.content = OTHER + OTHER
    arrives(published, path, OTHER + OTHER)


@pytest.mark.parametrize("part", ["bytes 0-9/300000", "bytes 150001-299999/300000", "nonsense", None])
def test_server_that_sends_another_part(server, tmp_path, part):
    server.faults = [{"cut": HALF}, {"headers": {"Content-Range": part}}]
    arrives(RemoteFile(server.url, None, None), tmp_path / "file.bin")
    assert server.ranges == [None, f"bytes={HALF}-", None]


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        ({"ETag": '"a"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, '"a"'),
        ({"ETag": 'W/"a"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, "Mon, 01 Jan 2024 00:00:00 GMT"),
        ({"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, "Mon, 01 Jan 2024 00:00:00 GMT"),
        ({"ETag": 'W/"a"'}, None),
        ({}, None),
    ],
)
def test_goes_on_only_while_the_server_vouches_for_the_file(server, tmp_path, headers, condition):
    server.headers = headers
    server.faults = [{"cut": HALF}]
    arrives(server.file(), tmp_path / "file.bin")
    assert server.conditions == [None, condition]
    assert server.ranges == [None, f"bytes={HALF}-" if condition else None]


def test_partial_file_longer_than_the_file_on_the_server(server, tmp_path):
    """The server answers 416, and the download starts anew."""
    (tmp_path / "file.bin.partial").write_bytes(CONTENT + b"more")
    remembered = {"url": server.url, "validator": '"1"', "total": len(CONTENT) + 9}
    (tmp_path / "file.bin.partial.json").write_text(json.dumps(remembered))
    arrives(server.file(), tmp_path / "file.bin")
    assert server.ranges == [f"bytes={len(CONTENT) + 4}-", None]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[1]",
        '{"url": "http://',
        '{"url": "http://127.0.0.1/x", "validator": "\\"1\\"", "total": 300000}',
        "\xff",
    ],
)
def test_partial_file_of_unknown_origin(server, tmp_path, text):
    """Without a word on what the bytes are a part of, or with one of another address, the download starts anew."""
    (tmp_path / "file.bin.partial").write_bytes(OTHER[:HALF])
    if text is not None:
        (tmp_path / "file.bin.partial.json").write_bytes(text.encode("latin-1"))
    arrives(RemoteFile(server.url, None, None), tmp_path / "file.bin")
    assert server.ranges == [None]


def test_stopped_between_the_last_byte_and_the_check(server, tmp_path):
    (tmp_path / "file.bin.partial").write_bytes(CONTENT)
    remembered = {"url": server.url, "validator": '"1"', "total": len(CONTENT)}
    (tmp_path / "file.bin.partial.json").write_text(json.dumps(remembered))
    arrives(server.file(), tmp_path / "file.bin")
    assert server.ranges == []
