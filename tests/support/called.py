"""The command `fairseq-hash` in this process, and what it prints."""

import contextlib
import io

from fairseq_hash.cli import main

WORDS = ("the", "of", "and", "hash", "table")


def call(*arguments):
    """Return exit status, standard output and standard error of `fairseq-hash` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def refused(*arguments, status=1):
    """Return the one line that a call ends with."""
    code, out, err = call(*arguments)
    assert (code, out) == (status, "") and err.endswith("\n") and err.count("\n") == 1, err
    return err[:-1]


def shown(out):
    """Return the rows of a table that was printed, by their names."""
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in out.splitlines() if "│" in line]
    return dict(cells)


def write_dictionary(path, counts):
    path.write_text("".join(f"{word} {count}\n" for word, count in zip(WORDS, counts, strict=True)))
    return path
