"""How far a training of a study is, by its log."""

import json

import pytest

from fairseq_hash.studies.progress import how_far


@pytest.mark.parametrize("experts", [4, 256])
def test_how_far_a_training_is_whatever_its_number_of_experts(tmp_path, experts):
    """A line holds the load of every expert of every layer."""
    lines = []
    for update in (10, 20, 30):
        values = {"num_updates": str(update), "wpb": "64", "ppl": "12.5", "wps": "1000"}
        values |= {f"layer{layer}_load": [1 / experts] * experts for layer in range(8)}
        lines.append(f"2026-11-28 10:00:00 | INFO | train_inner | {json.dumps(values)}\n")
    log = tmp_path / "train.log"
    log.write_text("".join(lines))
    assert how_far(log, 64 * 40) == (0.75, "perplexity 12.5, 1,000 tokens/s")


def test_no_log_is_no_progress(tmp_path):
    assert how_far(tmp_path / "train.log", 100) == (0.0, "")
