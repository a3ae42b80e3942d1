"""Every reader of files: mutated ones are accepted or refused in one line, soon and in little memory.

This is a short dose; `python benchmarks/fuzz.py` gives the full one.
"""

import pytest
from fuzz_readers import READERS
from fuzz_rounds import play

INPUTS = 100


@pytest.mark.parametrize("name", READERS)
def test_mutated_files(tmp_path, name):
    result = play(READERS[name], tmp_path, INPUTS, seed=1)
    assert not result.faults, "\n".join(f"input {f.first}: {f.what}\n{f.trace}" for f in result.faults.values())
    if result.inputs >= 20:
        assert result.refused > result.inputs / 20, "hardly anything is refused: are the mutations any?"
