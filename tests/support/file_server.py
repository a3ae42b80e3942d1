"""A file server on loopback that cuts, truncates, corrupts, changes its mind and stalls as a test tells it to."""

import hashlib
import os
import random
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_prep import download as module
from data_prep.download import RemoteFile, download
from fairseq_hash.core.errors import UserError

CONTENT = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
HALF = len(CONTENT) // 2
AGAIN = "or get it by other means and use --local PATH"


class Server(ThreadingHTTPServer):
    """Serves `content`; `faults` holds, for the coming requests in order, what goes wrong with each (see `Handler`)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.headers = {"ETag": '"1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
        self.faults = []
        self.ranges = []  # the Range header of each request
        self.conditions = []  # the If-Range header of each request
        self.release = threading.Event()  # ends a stall

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"

    def file(self, content=CONTENT):
        return RemoteFile(self.url, len(content), hashlib.sha256(content).hexdigest())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, condition = self.server, self.headers["If-Range"]
        server.ranges.append(self.headers["Range"])
        server.conditions.append(condition)
        fault = server.faults.pop(0) if server.faults else {}
        if "status" in fault:
            return self.send_error(fault["status"])
        whole, headers = server.content, dict(server.headers)
        first, status = 0, 200
        valid = condition in server.headers.values() or fault.get("ignore_condition")
        if self.headers["Range"] and valid and not fault.get("ignore_range"):
            first, status = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")), 206
            if first >= len(whole):
                return self.send_error(416)
            headers["Content-Range"] = f"bytes {first}-{len(whole) - 1}/{len(whole)}"
        headers.update(fault.get("headers", {}))
        self.send_response(status)
        if "Transfer-Encoding" not in headers:
            headers.setdefault("Content-Length", str(len(whole) - first))
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(whole[first:][: fault.get("cut")])
        if fault.get("stall"):
            self.wfile.flush()
            server.release.wait(30)

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "PAUSE", 0.001)
    with serving() as server:
        yield server


def ignore(done, total):
    pass


def assert_whole(path, content=CONTENT):
    """The file is there, and nothing else."""
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def arrives(file, path, content=CONTENT):
    """The download ends with the whole file."""
    download(file, path, ignore)
    assert_whole(path, content)


def fails(file, path, *parts, kept=0):
    """The download ends in one line with these parts, and leaves so many bytes and what they are a part of."""
    with pytest.raises(UserError) as caught:
        download(file, path, ignore)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    left = {name: (path.parent / name).stat().st_size for name in os.listdir(path.parent)}
    assert left.pop(f"{path.name}.partial", None) == (kept or None)
    assert list(left) == ([f"{path.name}.partial.json"] if kept else [])
