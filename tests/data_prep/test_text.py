"""Reading text: every line, from plain and compressed files; damage and other encodings in one line."""

import bz2
import gzip
import lzma

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import text
from fairseq_hash.core.errors import UserError

COMPRESSORS = {".txt": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}


def read(*paths):
    return list(text.read_lines(paths, lambda done: None))


@given(
    lines=st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n\r"))),
    kind=st.sampled_from(list(COMPRESSORS)),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_come_as_they_were_written(tmp_path, lines, kind):
    """Only a newline ends a line: not the other characters that Unicode calls line ends."""
    lines = ["first", *lines]
    path = tmp_path / f"text{kind}"
    path.write_bytes(COMPRESSORS[kind]("".join(line + "\n" for line in lines).encode()))
    assert read(path) == lines


def test_files_follow_one_another_and_are_counted(tmp_path):
    """A last line without a newline is a line; a byte-order mark and carriage returns are no text."""
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three\n"))
    seen = []
    paths = [tmp_path / "a.txt", tmp_path / "b.txt.gz"]
    assert list(text.read_lines(paths, seen.append)) == ["one", "", "two", "three"]
    assert seen == [paths[0].stat().st_size, sum(path.stat().st_size for path in paths)]


def test_progress_is_told_on_the_way(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("a line of text\n" * 200_000)
    seen = []
    assert sum(1 for _ in text.read_lines([path], seen.append)) == 200_000
    assert len(seen) > 10 and seen == sorted(seen) and seen[-1] == path.stat().st_size


@pytest.mark.parametrize("kind", [".xz", ".gz", ".bz2"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "another file"])
def test_damage_is_told_in_one_line(tmp_path, kind, damage):
    path = tmp_path / f"text{kind}"
    whole = COMPRESSORS[kind](b"".join(b"line %d of the text\n" % n for n in range(5000)))
    middle = len(whole) // 2
    broken = {
        "cut": whole[:-10],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :],
        "another file": b"plain text, not compressed\n" * 3,
    }
    path.write_bytes(broken[damage])
    with pytest.raises(UserError, match="is the file whole") as error:
        read(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_another_encoding_is_told_with_its_line(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("one\ntwo\nd\u00e9j\u00e0 vu\n".encode("latin-1"))
    with pytest.raises(UserError, match="latin.txt, line 3, is not UTF-8; convert the file"):
        read(path)


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "one line.txt"
    path.write_bytes(b"short\n" + b"x" * (1 << 20) + b"\n")
    with pytest.raises(UserError, match="line 2, is longer than 1 MiB"):
        read(path)


@pytest.mark.parametrize("content", [b"\n\n  \n", b"\r\n\t\r\n"])
def test_text_without_text_is_refused(tmp_path, content):
    (tmp_path / "blank.txt").write_bytes(content)
    with pytest.raises(UserError, match="no line has text"):
        read(tmp_path / "blank.txt")


def test_missing_and_empty_files_are_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="empty.txt is empty"):
        text.check_files([tmp_path / "empty.txt"])
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            text.check_files([path])
