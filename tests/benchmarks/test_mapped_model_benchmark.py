"""benchmarks/mapped_model.py: a model that is evaluated in less memory than its experts need, under a real limit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "mapped_model.py"
SMALL = "--experts 16 --layers 12 --width 384 --limit-gb 0.6 --tokens 256 --batches 1 --rounds 1".split()


@pytest.mark.slow
def test_a_model_larger_than_the_memory_of_its_cgroup_has_the_same_perplexity(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *SMALL, "--folder", str(tmp_path), "--out", str(tmp_path / "a.md")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    if "cannot limit memory" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "a.md").read_text()
    assert done.stdout.endswith(text)  # after the progress
    assert "- perplexities: the same in all ways" in text
    row = text.strip().splitlines()[-1].split(" | ")
    assert (
        row[0] == "| 256" and float(row[5].split()[0]) > 1.2
    )  # GB: 0.9 for the checksums, and what 0.6 cannot keep again
