"""Small text for `python -m data_prep`, and its arguments."""

import random

from fairseq.data import Dictionary, indexed_dataset

SPLITS = ("train", "valid", "test")


def write_text(folder, lines=300):
    """Three files of sentences of 40 words, with blank lines between paragraphs."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(1, 8))) for _ in range(40)]
    for split, count in zip(SPLITS, (lines, 30, 20), strict=True):
        text = [" ".join(generator.choices(words, k=generator.randint(1, 12))) for _ in range(count)]
        text[5] = ""
        (folder / f"{split}.txt").write_text("\n".join(text) + "\n")
    return {split: [folder / f"{split}.txt"] for split in SPLITS}


def arguments(files, out, *more):
    named = [word for split in SPLITS for word in (f"--{split}", *map(str, files[split]))]
    return ["text", *named, "--out", str(out), "--workers", "2", *more]


def lines_of(folder, split):
    """The lines of binarized data as symbols, ends of lines left out."""
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    data = indexed_dataset.make_dataset(str(folder / split), "mmap")
    rows = [[dictionary[token] for token in data[n].tolist()] for n in range(len(data))]
    assert all(row[-1] == "</s>" for row in rows)
    return [row[:-1] for row in rows]
