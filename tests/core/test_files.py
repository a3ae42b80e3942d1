"""Output files are whole under their names or not there at all, whatever happens while they are written."""

import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import atomic_write, check_out, output_file, remove_partials, write_folder

PARTIAL_NAME = re.compile(r"\.out\.[0-9a-f]{8}\.partial")


@pytest.fixture
def out(tmp_path):
    """A file that is there already, in a folder of its own."""
    path = tmp_path / "out"
    path.write_bytes(b"before")
    return path


def test_a_file_appears_when_it_is_whole(out):
    with atomic_write(out) as partial:
        partial.write_bytes(b"new")
        assert partial.parent == out.parent and PARTIAL_NAME.fullmatch(partial.name)
        assert out.read_bytes() == b"before"
    assert out.read_bytes() == b"new" and list(out.parent.iterdir()) == [out]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "folder"
    for error in (KeyError, None):
        try:
            with atomic_write(out) as partial:
                partial.mkdir()
                (partial / "file").write_bytes(b"new")
                if error:
                    raise error
        except KeyError:
            assert not list(tmp_path.iterdir())
    assert (out / "file").read_bytes() == b"new" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), KeyError])
def test_a_write_that_fails_leaves_what_was_there(out, error):
    with pytest.raises(type(error) if isinstance(error, OSError) else error), atomic_write(out) as partial:
        partial.write_bytes(b"half")
        raise error
    assert out.read_bytes() == b"before" and list(out.parent.iterdir()) == [out]


def test_a_killed_writer_leaves_what_was_there_and_a_name_that_is_known(out):
    program = (
        "import os, signal, sys; from pathlib import Path; from fairseq_hash.core.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as partial:\n"
        "    partial.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, out])
    assert done.returncode == -signal.SIGKILL and out.read_bytes() == b"before"
    (left,) = (path for path in out.parent.iterdir() if path != out)
    assert PARTIAL_NAME.fullmatch(left.name)
    (out.parent / "mine.partial").touch()
    remove_partials(out.parent)
    assert sorted(path.name for path in out.parent.iterdir()) == ["mine.partial", "out"]


def test_writers_at_once_do_not_mix(out):
    """Each writes a file of one letter, line by line, at the same time; one of them is there at the end."""
    barrier = threading.Barrier(4)

    def write(letter):
        with atomic_write(out) as partial, partial.open("w") as file:
            barrier.wait(60)
            for _ in range(1000):
                file.write(f"{letter}\n")

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert out.read_text() in {f"{letter}\n" * 1000 for letter in "abcd"} and list(out.parent.iterdir()) == [out]


def test_a_durable_file_is_on_disc_before_it_has_its_name(out, monkeypatch):
    """The content, then the name, then the folder that has the name."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    with atomic_write(out) as partial:
        partial.touch()
    assert done == ["renamed"]
    with atomic_write(out, is_durable=True) as partial:
        partial.touch()
    assert done[1:] == [str(partial), "renamed", str(out.parent)]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    line = r"^cannot write .*/no/out \(.*No such file or directory.*\); give a file that you can write$"
    with pytest.raises(UserError, match=line), output_file(tmp_path / "no" / "out") as partial:
        partial.touch()


def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write everywhere")
    with pytest.raises(UserError, match=r"^cannot write .*Permission denied"), output_file(tmp_path / "out") as partial:
        partial.touch()
    with pytest.raises(UserError, match="cannot write to the folder"):
        check_out(tmp_path / "out", overwrite=False)


def test_a_full_disc(tmp_path):
    """`ulimit -f` stands for it: no file may be larger than a block."""
    program = (
        "import signal, sys; from pathlib import Path; from fairseq_hash.core.files import output_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with output_file(Path(sys.argv[1])) as partial: partial.write_bytes(bytes(1 << 20))"
    )
    words = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", sys.executable, "-c", program, tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert re.search(r"UserError: cannot write .*/out \(.*File too large.*\)", done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_files(tmp_path):
    paths = write_folder(tmp_path / "new" / "folder", {"a": b"1", "b": b"2"})
    assert [path.read_bytes() for path in paths] == [b"1", b"2"]
    (tmp_path / "file").touch()
    line = r"^cannot write to --out \S+/file: File exists; give a folder that you can write to$"
    with pytest.raises(UserError, match=line):
        write_folder(tmp_path / "file", {"a": b"1"})


def test_who_reads_the_old_file_reads_on(tmp_path):
    """The new file takes the name; the old one is not written over in place."""
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as held:
        with atomic_write(path) as partial:
            partial.write_text("new")
        assert (held.read(), path.read_text()) == ("old", "new")
