"""Dialogues: one utterance per line with its speaker (`user: ...`, `system: ...`), a blank line between dialogues."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError

from .sources import GivenText
from .text import read_lines

SPEAKERS = ("user", "system")
UTTERANCE = re.compile(rf"({'|'.join(SPEAKERS)}):( |$)")  # an utterance may be empty
SHOWN = 60  # characters shown of a refused line


class DialogueText(GivenText):
    """The user's files of dialogues. The text stays as it is: its blank lines are the ends of dialogues."""

    def identity(self) -> dict[str, Any]:
        """Return the files' SHA-256 and their counts, by split.

        Raises:
            UserError: if a file is missing, empty or not in the form of dialogues.
        """
        given = super().identity()
        return {**given, "corpus": "dialogue", "held": {split: count(paths) for split, paths in self.files.items()}}


def count(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the numbers of dialogues, of utterances, and of utterances of each speaker in some files.

    Raises:
        UserError: for the first line of another form; for a file that ends inside a dialogue, if another file follows.
    """
    dialogues = 0
    speakers = Counter[str](dict.fromkeys(SPEAKERS, 0))
    is_open = False
    for before, path in zip([None, *paths], paths, strict=False):
        if is_open:  # otherwise the last dialogue of the file before would continue in this one
            raise UserError(f"{before} has no blank line at its end, and {path} follows it; add one")
        for number, line in enumerate(read_lines([path], lambda done: None), start=1):
            if not line.strip():
                is_open = False
                continue
            found = UTTERANCE.match(line)
            if found is None:
                allowed = " or ".join(f"{speaker}: TEXT" for speaker in SPEAKERS)
                raise UserError(
                    f"{path}, line {number:,}, is {line[:SHOWN]!r}; give an utterance with its speaker ({allowed}), or "
                    "a blank line between dialogues"
                )
            speakers[found[1]] += 1
            dialogues += not is_open
            is_open = True
    return {"dialogues": dialogues, "utterances": speakers.total(), "speakers": dict(speakers)}
