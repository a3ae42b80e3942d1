"""A small binarized corpus: 60 words with Zipf frequencies, each favouring a successor."""

import random

import plugin


def make_corpus(folder):
    """Write the texts and what fairseq-preprocess makes of them; return the folder of the latter."""
    generator = random.Random(0)
    words = [f"word{rank}" for rank in range(60)]
    weights = [1 / (rank + 3) for rank in range(60)]
    for split, lines in (("train", 600), ("valid", 60), ("test", 60)):
        text = []
        for _ in range(lines):
            line = generator.choices(words, weights, k=generator.randint(4, 14))
            for place in range(1, len(line)):
                if generator.random() < 0.5:
                    line[place] = words[(words.index(line[place - 1]) * 7 + 3) % 60]
            text.append(" ".join(line))
        (folder / f"{split}.txt").write_text("\n".join(text) + "\n")
    prefixes = [f"--{split}pref={folder / split}.txt" for split in ("train", "valid", "test")]
    plugin.command("preprocess", "--only-source", *prefixes, "--destdir", folder / "bin")
    return folder / "bin"
