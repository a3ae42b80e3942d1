"""benchmarks/mapped_experts.py: an evaluation in less memory than the experts need, under a real limit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "mapped_experts.py"
SMALL = "--experts-gb 0.6 --limit-gb 0.4 --layers 24 --tokens 64 --passes 1 --rounds 1".split()


@pytest.mark.slow
def test_experts_larger_than_the_memory_of_their_cgroup_give_the_same_bits(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *SMALL, "--folder", str(tmp_path), "--out", str(tmp_path / "a.md")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    if "cannot limit memory" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "a.md").read_text()
    assert done.stdout.endswith(text)  # after the progress
    assert "- outputs: equal to the bit in all ways" in text
    row = text.strip().splitlines()[-1].split(" | ")
    assert row[0] == "| 64" and float(row[5]) > 0.5  # GB that had to be read: the experts do not stay in memory
