"""`fairseq-hash report --watch`: a page of runs that train still, whole at every moment."""

import re
import signal
import subprocess
import sys
import time

import pytest
from called import call
from html_page import Page
from made_runs import write_run

from fairseq_hash.reporting import watching
from fairseq_hash.reporting.watching import current_page


def cut(log, lines):
    """Leave the first lines of a log, and half of the next."""
    text = log.read_text().splitlines(True)
    log.write_text("".join(text[:lines]) + text[lines][: len(text[lines]) // 2])
    return "".join(text)


@pytest.fixture
def log(tmp_path):
    """The log of a run of 4 updates: 4 lines, then two for each update."""
    return write_run(tmp_path / "runs" / "a run", {"name": "Mine"}) / "rank0.log"


def read(html):
    seen = Page()
    seen.feed(html)
    return seen


def progress_of(html):
    """Return the row of the first table by its headings."""
    headings, row = read(html).tables[0]
    return dict(zip(headings, row, strict=True))


def test_a_run_is_shown_as_far_as_it_is(log, tmp_path):
    """Two updates of four, of which the second has no validation yet; then all of it."""
    whole = cut(log, 7)
    html, fault = current_page([tmp_path / "runs"], "T", "", 5)
    row = progress_of(html)
    assert fault == "" and "Training now" in html
    assert (row["Model"], row["Update"], row["Of"], row["Done"], row["Left"]) == ("Mine", "2", "4", "50%", "1 s")
    assert (row["Perplexity, training"], row["Perplexity, validation"]) == ("50.00", "60.00")
    assert "update 2 of 4" in row["State"] and "seems to run still" in row["State"]
    (drawn,) = [line for line in read(html).charts[0]["lines"] if line["what"].startswith("training")]
    assert (drawn["x"], drawn["y"]) == ([1, 2], [60, 50])
    log.write_text(whole)
    html, fault = current_page([tmp_path / "runs"], "T", "", 5)
    assert "Training now" not in html and read(html).charts[0]["lines"][0]["x"] == [1, 2, 3, 4]


def test_any_half_of_a_log_is_survived(log, tmp_path):
    """Cut in the middle of each of its lines, there is a page, with words where there are no numbers yet."""
    whole = log.read_text()
    for lines in range(len(whole.splitlines())):
        cut(log, lines)
        html, fault = current_page([tmp_path / "runs"], "T", "", 5)
        assert ("Nothing to show yet" in html) == bool(fault) == (lines < 5) and "\n" not in fault
        assert 'data-reload="5"' in html and '<meta http-equiv="refresh" content="5">' in html
        log.write_text(whole)


def test_a_page_that_is_not_watched_stays(log):
    assert "data-reload=" not in current_page.__globals__["page"].render("T", "", [])


def test_watching_in_a_terminal(log, tmp_path):
    """The page follows the log; Ctrl-C ends it with one line, and nothing half written is left."""
    whole, out = cut(log, 1), tmp_path / "out"
    command = [sys.executable, "-u", "-c", "from fairseq_hash.cli import main; raise SystemExit(main())"]
    command += ["report", tmp_path / "runs", "--out", out, "--watch", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        try:
            wait_for(lambda: "Nothing to show yet" in text_of(out), watcher)
            waiting = watcher.stdout.readline()
            log.write_text(whole)
            wait_for(lambda: "Learning curves" in text_of(out), watcher)
            kept = watcher.stdout.readline()  # it is said after the page is written
        finally:
            watcher.send_signal(signal.SIGINT)
            try:
                ended, err = watcher.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                watcher.kill()  # such as where the tests were started with SIGINT ignored
                raise
    assert watcher.returncode == 0 and "Traceback" not in err
    assert waiting.startswith("waiting: ")
    assert kept == f"{out / 'index.html'} is kept current every 1 s; Ctrl-C ends it\n"
    assert ended == f"ended; {out / 'index.html'} is as it was written last\n"
    assert [path.name for path in out.iterdir()] == ["index.html"]


def text_of(out):
    return (out / "index.html").read_text() if (out / "index.html").exists() else ""


def wait_for(holds, process):
    for _ in range(1200):
        if holds():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    pytest.fail("nothing came in two minutes")


def test_long_logs_are_read_less_often(log, tmp_path, monkeypatch):
    """Reading that takes 2 s waits 18 s; one that takes no time waits as long as was asked for."""
    clock, waited = iter([0.0, 2.0, 20.0, 20.0]), []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(watching.time, "sleep", sleep)
    watching.watch([tmp_path / "runs"], tmp_path / "out", "T", "", 5, print)
    assert waited == [18, 5]


def test_wrong_calls_are_one_line(log, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "file").touch()
    for arguments, status, message in (
        ((tmp_path / "none", "--out", out, "--watch"), 1, r"none is not a folder; give the folders .* or will"),
        ((tmp_path / "runs", "--out", tmp_path / "file", "--watch"), 1, r"cannot write to --out .*file"),
        ((tmp_path / "runs", "--out", out, "--watch", "0.5"), 2, r"--watch 0\.5 is not .* give 1 or more"),
        ((tmp_path / "runs", "--out", out, "--watch", "x"), 2, r"--watch x is not .* give 1 or more"),
        (("--benchmarks", "a.json", "--out", out, "--watch"), 2, r"--watch does not go with --benchmarks"),
        ((tmp_path / "runs", "--out", out, "--watch", "--note", "none.txt"), 1, r"cannot read --note none\.txt"),
    ):
        found, _, err = call("report", *arguments)
        assert found == status and re.search(message, err) and err.count("\n") == 1, err
    assert not out.exists()
