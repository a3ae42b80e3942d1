"""scripts/demo.py: options, the lock, the order of the work, and how it ends."""

import fcntl
import importlib
import re
import signal
from pathlib import Path

import pytest

from fairseq_hash.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(monkeypatch):
    """The module; its handler of SIGTERM is kept from this process."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("demo")
    monkeypatch.setattr(module.signal, "signal", lambda number, handler: handlers.update({number: handler}))
    handlers.clear()
    return module


handlers = {}


def ended(capsys):
    """Return the one line on standard error."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err[:-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds 0 is out of range; give a number from 1 to 100"),
        (["--seeds", "101"], "--seeds 101 is out of range; give a number from 1 to 100"),
        (["--updates", "9"], "--updates 9 is out of range; give a number from 10 to 1,000,000"),
        (["--data", "none"], "--data {}/none is not a folder; give one with train.txt, valid.txt and test.txt"),
        (["--data", "file"], "--data {}/file is not a folder; give one with train.txt, valid.txt and test.txt"),
        (["--data", "a:b"], "--data {}/a:b has a colon, where fairseq would part it; give a path without one"),
        (["--out", "a:b"], "--out {}/a:b has a colon, where fairseq would part it; give a path without one"),
        (["--out", "file"], "--out {}/file is not a folder; give another name"),
    ],
)
def test_wrong_options(demo, tmp_path, monkeypatch, capsys, arguments, message):
    """One line that names the value and the remedy; nothing is written."""
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run_demo", None)
    assert demo.main(arguments) == 1
    assert ended(capsys) == f"demo: {message.format(tmp_path)}"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_options_and_their_defaults(demo, tmp_path, monkeypatch):
    """Paths are taken from where the demo was called; it runs elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    assert demo.parse_options([]) == demo.Options(seeds=1, data=None, out=ROOT / "runs" / "demo", updates=800)
    given = demo.parse_options(["--seeds", "3", "--data", "text", "--out", "o", "--updates", "10"])
    assert given == demo.Options(seeds=3, data=tmp_path / "text", out=tmp_path / "o", updates=10)


def test_two_demos_do_not_share_a_folder(demo, tmp_path, monkeypatch, capsys):
    """The lock is held while the first runs, and free after it, however it ended."""
    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda options: calls.append(options))
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert demo.main(["--out", str(tmp_path)]) == 1
    assert ended(capsys) == f"demo: another demo writes to {tmp_path}; wait for its end or give another --out"
    assert demo.main(["--out", str(tmp_path)]) == 0 and len(calls) == 1

    def nested(options):
        calls.append(demo.main(["--out", str(tmp_path)]))
        raise UserError("the end")

    monkeypatch.setattr(demo, "run_demo", nested)
    assert demo.main(["--out", str(tmp_path)]) == 1 and calls[-1] == 1
    monkeypatch.setattr(demo, "run_demo", lambda options: None)
    assert demo.main(["--out", str(tmp_path)]) == 0


def test_how_it_ends(demo, tmp_path, monkeypatch, capsys):
    """A failure or an interruption is one line and a status, no traceback; SIGTERM is an exit that children see."""
    for error, status, line in (
        (UserError("a value; a remedy"), 1, "demo: a value; a remedy"),
        (demo.StepFailed("The step failed"), 1, "demo: The step failed"),
        (OSError(28, "No space left"), 1, "demo: [Errno 28] No space left; make room or set perm.*"),
        (KeyboardInterrupt(), 130, "demo: interrupted; the same command goes on from the last checkpoint"),
    ):

        def fail(options, error=error):
            raise error

        monkeypatch.setattr(demo, "run_demo", fail)
        assert demo.main(["--out", str(tmp_path)]) == status
        found = ended(capsys)
        assert found == line or re.fullmatch(re.escape(line).replace(r"\.\*", ".*"), found)
    with pytest.raises(SystemExit) as caught:
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert caught.value.code == 143


def test_the_order_of_the_work(demo, tmp_path, monkeypatch, capsys):
    """Each seed trains every model before the next seed begins, so that a stop leaves whole comparisons."""
    calls = []

    def make_run(out, updates, model, seed, data, corpus, display):
        calls.append((model, seed))
        assert (out, updates, data) == (tmp_path, 20, tmp_path / "bin")
        assert corpus == {"data": "the Python documentation that Python itself brings", "data_fingerprint": "f"}
        return tmp_path / f"{model}{seed}"

    def write_report(folders, out, title, note):
        calls.append([folder.name for folder in folders])
        assert out == tmp_path and "two" not in title
        assert (
            note.read_text().startswith("beside 8 runs\n\n")
            and "20 updates" in note.read_text()
            and "2 seeds a model" in note.read_text()
        )
        (out / "results.md").write_text("the results\n")

    monkeypatch.setattr(demo, "prepare_data", lambda *arguments: tmp_path / "bin")
    monkeypatch.setattr(demo, "cut_data", lambda data, tokens, *rest: calls.append(tokens) or data)
    monkeypatch.setattr(demo, "data_fingerprint", lambda folder: "f")
    monkeypatch.setattr(demo, "make_run", make_run)
    monkeypatch.setattr(demo, "measure_ngrams", lambda data, tokens: calls.append(tokens))
    monkeypatch.setattr(demo, "load_run", lambda folder: folder.name)
    monkeypatch.setattr(demo, "beside_ngrams", lambda lines, runs: f"beside {len(runs)} runs")
    monkeypatch.setattr(demo, "write_report", write_report)
    assert demo.main(["--out", str(tmp_path), "--seeds", "2", "--updates", "20"]) == 0
    models = ["dense", "hash", "switch", "base"]
    expected = [(model, seed) for seed in (1, 2) for model in models]
    tokens = 20 * 1024  # of 20 updates: cut before, counted after the trainings
    assert calls == [tokens, *expected, tokens, [f"{model}{seed}" for model, seed in expected]]
    out = capsys.readouterr().out
    assert "the results\n" in out and out.endswith(f"The page with all of it: {tmp_path / 'index.html'}\n")


def test_the_note_says_what_the_seeds_tell(demo, tmp_path):
    """One seed measures no chance; more do. Nothing is left to fill in."""
    notes = {}
    for seeds in (1, 3):
        options = demo.Options(seeds=seeds, data=None, out=tmp_path, updates=1000)
        notes[seeds] = demo.note_text(options, "some text")
        assert "trained for 1,000 updates" in notes[seeds] and not re.search(r"[{}]", notes[seeds])
        assert "some text, with" in notes[seeds] and "16 experts" in notes[seeds]
    assert "one seed a model" in notes[1] and "no measure of chance" in notes[1] and "no measure" not in notes[3]
    assert "3 seeds a model" in notes[3] and "The spread over these seeds" in notes[3]
