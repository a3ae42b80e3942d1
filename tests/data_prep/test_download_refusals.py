"""Downloads that must not succeed: corrupt content, refusals, stalls, a full disk, other processes."""

import hashlib
import os
import resource
import subprocess
import sys
import threading
import time

import pytest
from file_server import AGAIN, CONTENT, HALF, OTHER, arrives, assert_whole, fails, ignore, serving

from data_prep import download as module
from data_prep.download import RemoteFile, download, exclusive
from fairseq_hash.core.errors import UserError


def test_corrupt_content(server, tmp_path):
    path = tmp_path / "file.bin"
    server.content = CONTENT[:HALF] + b"\x00\x01" + CONTENT[HALF + 2 :]
    found, expected = (hashlib.sha256(content).hexdigest() for content in (server.content, CONTENT))
    fails(server.file(), path, server.url, found, expected, "run again", AGAIN)
    assert os.listdir(tmp_path) == []
    server.content = CONTENT
    arrives(server.file(), path)


def test_wrong_size_is_refused_before_anything_is_written(server, tmp_path):
    path = tmp_path / "file.bin"
    server.faults = [{"cut": HALF}, {"status": 404}]
    fails(server.file(), path, kept=HALF)
    server.content, server.headers = b"<html>Please log in</html>", {}
    fails(server.file(), path, "26 bytes", f"{len(CONTENT)} are expected", "login page", AGAIN, kept=HALF)
    server.content, server.headers = CONTENT, {"ETag": '"1"'}
    arrives(server.file(), path)
    assert server.ranges[-1] == f"bytes={HALF}-"


def test_server_that_states_no_length(server, tmp_path):
    path = tmp_path / "file.bin"
    server.faults = [{"headers": {"Content-Length": None}}] * 2
    fails(RemoteFile(server.url, None, None), path, "does not say how long", AGAIN)
    arrives(server.file(), path)


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (410, 1), (429, 5), (500, 5), (503, 5), (416, 5)])
def test_refusals(server, tmp_path, status, requests):
    """What will not pass by itself is told at once."""
    server.faults = [{"status": status}] * 99
    fails(server.file(), tmp_path / "file.bin", server.url, f"the server answers {status} ", AGAIN)
    assert len(server.ranges) == requests


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "PAUSE", 0.001)
    with serving() as server:
        url = server.url
    fails(RemoteFile(url, 1, None), tmp_path / "file.bin", url, "Connection refused", AGAIN)


def test_not_http(tmp_path, monkeypatch, server):
    server.finish_request = lambda request, _: request.sendall(b"SSH-2.0-OpenSSH\r\n")
    fails(server.file(), tmp_path / "file.bin", server.url, "SSH-2.0", AGAIN)


def test_stalling_server(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    server.faults = [{"cut": HALF, "stall": True}] + [{"cut": 0, "stall": True}] * module.ATTEMPTS
    fails(server.file(), tmp_path / "file.bin", "timed out", AGAIN, kept=HALF)


def test_stall_is_overcome(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    server.faults = [{"cut": HALF, "stall": True}]
    arrives(server.file(), tmp_path / "file.bin")
    assert server.ranges == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize("limit", [100_001, len(CONTENT) - 1])
def test_disk_that_is_full(server, tmp_path, limit):
    """What fits is kept, and the download goes on from there. A limit on file sizes stands in for the disk's."""
    path = tmp_path / "file.bin"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        fails(server.file(), path, "file.bin.partial: File too large", "run again", kept=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    arrives(server.file(), path)
    assert server.ranges == [None, f"bytes={limit}-"]


def test_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(UserError, match=r"folder.*: (Not a directory|File exists); fix that and run again"):
        download(server.file(), tmp_path / "folder" / "file.bin", ignore)


def test_finished_file_is_used(server, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    assert download(server.file(), path, ignore) == path
    assert_whole(path)
    assert server.ranges == []


@pytest.mark.parametrize("content", [CONTENT[:-1], OTHER])
def test_another_file_at_the_path_is_refused(server, tmp_path, content):
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        download(server.file(), path, ignore)
    found, expected = ("299999 bytes", "300000") if content is not OTHER else (sha(OTHER), sha(CONTENT))
    for part in (str(path), found, expected, "delete it", AGAIN):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_whole(path, content)
    assert server.ranges == []


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_killed_process_and_a_second_one(server, tmp_path):
    """While one process downloads, a second is told; when the first is killed, the next goes on from its bytes."""
    path, partial = tmp_path / "file.bin", tmp_path / "file.bin.partial"
    server.faults = [{"cut": HALF, "stall": True}]
    program = (
        "import sys; from pathlib import Path; from data_prep.download import RemoteFile, download\n"
        "download(RemoteFile(sys.argv[1], None, None), Path(sys.argv[2]), lambda done, total: print(done, flush=True))"
    )
    command = [sys.executable, "-c", program, server.url, str(path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for line in first.stdout:
            if int(line) == HALF:
                break
        fails(server.file(), path, str(partial), "in use by another process", kept=HALF)
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    server.release.set()
    arrives(server.file(), path)
    assert server.ranges == [None, f"bytes={HALF}-"]


def test_lock_holds_the_file_that_bears_the_name(tmp_path, monkeypatch):
    """A file that was renamed or removed by its last holder, between our opening and locking it, is not taken."""
    path, flock = tmp_path / "file.partial", module.fcntl.flock
    damages = [lambda: path.rename(tmp_path / "file"), path.unlink, lambda: None]

    def late_flock(*args):
        damages.pop(0)()
        flock(*args)

    monkeypatch.setattr(module.fcntl, "flock", late_flock)
    with exclusive(path) as stream:
        stream.write(b"mine")
    assert path.read_bytes() == b"mine"
    assert damages == [] and (tmp_path / "file").read_bytes() == b""


def test_many_at_once(server, tmp_path):
    """Of several that want the same file at once, each has it whole or is told; none damages it."""
    path, outcomes = tmp_path / "file.bin", []
    server.faults = [{"cut": 1000}] * 20

    def work():
        try:
            outcomes.append(download(server.file(), path, ignore).read_bytes() == CONTENT)
        except UserError as error:
            outcomes.append("in use" in str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
        time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 8
    assert_whole(path)
