"""Dialogues: an utterance a line with its speaker (`user: ...`, `system: ...`), a blank line between dialogues."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_hash.core.errors import UserError

from .sources import GivenText
from .text import read_lines

SPEAKERS = ("user", "system")
UTTERANCE = re.compile(rf"({'|'.join(SPEAKERS)}):( |$)")  # some say nothing
SHOWN = 60  # characters of a line that is refused


class DialogueText(GivenText):
    """Files of dialogues of the user's. The text stays as it is: its blank lines are the ends of dialogues."""

    def identity(self) -> dict[str, Any]:
        """Return the files' SHA-256 and what they hold, by split.

        Raises:
            UserError: if a file is missing, empty or not in the form of dialogues.
        """
        given = super().identity()
        return {**given, "corpus": "dialogue", "held": {split: count(paths) for split, paths in self.files.items()}}


def count(paths: Sequence[Path]) -> dict[str, Any]:
    """Return how many dialogues and utterances files have, and how many utterances each speaker.

    Raises:
        UserError: for the first line of another form; for a file that ends inside a dialogue where another follows.
    """
    dialogues = 0
    speakers = Counter[str](dict.fromkeys(SPEAKERS, 0))
    is_open = False
    for before, path in zip([None, *paths], paths, strict=False):
        if is_open:  # the first utterance of this file would go on with the last dialogue of the one before
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
