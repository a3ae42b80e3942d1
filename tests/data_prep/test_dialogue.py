"""`python -m data_prep dialogue`: its form is checked, counted and kept, so that a dialogue is a sample."""

import gzip
import json
import lzma

import numpy as np
import pytest
from plugin import build
from prepared import lines_of

from data_prep.cli import main
from data_prep.dialogue import count
from fairseq_hash.core.errors import UserError

SPLITS = ("train", "valid", "test")
pytestmark = pytest.mark.usefixtures("in_one_process")
DIALOGUES = [
    ["user: a table for two", "system: where do you want to dine ?", "user: here", "system: "],
    ["user: play a song", "system: which one ?"],
    ["user: what is the weather like in the town where I was born , and what is it like here ?", "system: fine"],
]


def write(folder, text=None):
    """Write the dialogues, or another text, to a file for each split; return the words of the command line."""
    ends = ("\n\n", "\n\n\n", "\n")  # the last one ends with the file
    text = text or "".join("\n".join(lines) + end for lines, end in zip(DIALOGUES, ends, strict=True))
    words = []
    for split, opener, suffix in zip(SPLITS, (open, lzma.open, gzip.open), ("", ".xz", ".gz"), strict=True):
        path = folder / f"{split}.txt{suffix}"
        with opener(path, "wb") as file:
            file.write(text.encode())
        words += [f"--{split}", str(path)]
    return words


def samples(data, length):
    """Return the samples that fairseq makes of the test split, as text, and their sizes."""
    fixed = ("--sample-break-mode", "complete_doc", "--tokens-per-sample", str(length))
    _, task, _, _ = build(data, *fixed)
    task.load_dataset("test")
    dataset = task.datasets["test"]
    made = [task.source_dictionary.string(dataset[n]["target"], include_eos=True) for n in range(len(dataset))]
    return made, np.array(dataset.sizes).tolist()


def test_a_dialogue_is_a_sample(tmp_path):
    """Whole where it is short enough; cut between utterances, and never inside one, where it is not."""
    out = tmp_path / "data"
    assert main(["dialogue", *write(tmp_path), "--out", str(out), "--words"]) == 0
    whole = ["".join(f"{line.strip()} </s> " for line in lines).strip() for lines in DIALOGUES]
    made, sizes = samples(out, 32)
    assert made == whole and max(sizes) <= 32
    # Of 18 tokens at most: what does not fit goes on in a sample of its own; the longest utterance has 22.
    made, sizes = samples(out, 18)
    assert " ".join(made) == " ".join(whole)
    assert all(text.startswith(("user:", "system:")) and text.endswith("</s>") for text in made)
    assert sizes == [18, 2, 10, 22, 3]
    record = json.loads((out / "provenance.json").read_text())
    held = {"dialogues": 3, "utterances": 8, "speakers": {"user": 4, "system": 4}}
    assert record["identity"]["corpus"] == "dialogue"
    assert record["identity"]["held"] == dict.fromkeys(SPLITS, held)
    assert {split: totals["lines"] for split, totals in record["splits"].items()} == dict.fromkeys(SPLITS, 11)

    like = tmp_path / "like"
    other = write(tmp_path, "user: a song\nsystem: nothing known\n")
    assert main(["dialogue", *other, "--out", str(like), "--words", "--like", str(out)]) == 0
    assert (like / "dict.txt").read_bytes() == (out / "dict.txt").read_bytes()
    assert lines_of(like, "test") == [["user:", "a", "song"], ["system:", "<unk>", "<unk>"]]


@pytest.mark.parametrize(
    "line", ["hello", "user:hello", "User: hello", "bot: hello", " user: hello", "users: hello", "user hello"]
)
def test_the_first_line_of_another_form_is_named(tmp_path, capsys, line):
    words = write(tmp_path, f"user: hello\n\n{line}\nanother\n")
    assert main(["dialogue", *words, "--out", str(tmp_path / "data")]) == 1
    error = capsys.readouterr().err
    expected = "give an utterance with its speaker (user: TEXT or system: TEXT), or a blank line between dialogues"
    assert f"data_prep: {tmp_path}/train.txt, line 3, is {line!r}; {expected}\n" == error
    assert not (tmp_path / "data").exists()


def test_a_dialogue_does_not_go_on_in_the_next_file(tmp_path):
    """Where the first file has no blank line at its end, the two dialogues would be one."""
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("user: one\nsystem: one\n")
    other.write_text("\nuser: two\r\n  \r\nsystem: three\n")
    with pytest.raises(UserError, match="one.txt has no blank line at its end, and .*other.txt follows it; add one"):
        count([one, other])
    one.write_text("user: one\nsystem: one\n\n")
    assert count([one, other]) == {"dialogues": 3, "utterances": 4, "speakers": {"user": 2, "system": 2}}
