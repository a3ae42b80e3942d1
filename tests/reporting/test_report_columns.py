"""The columns of a report on made logs: speed and memory by hand; and checkpoints that contradict their log."""

import statistics

import pytest
import torch
from made_runs import write_run

from fairseq_hash.checkpoint.manifest import KEY, Manifest
from fairseq_hash.reporting.compare import sort_out
from fairseq_hash.reporting.comparison import compare
from fairseq_hash.reporting.comparison_table import for_readers, measure
from fairseq_hash.reporting.runs import load_runs

LOGGED = [
    {"ppl": 50, "ups": 0.5, "wps": 10, "peak_gb": 3.5},
    {"ppl": 40, "ups": 4, "wps": 800, "peak_gb": 1.25},
    {"ppl": 30, "ups": 2.5, "wps": 500},
    {"ppl": 20, "ups": 3, "wps": 700, "peak_gb": 2},
]


def test_speed_and_memory_by_hand(tmp_path):
    """Medians without the first of four intervals; the peak of all of them."""
    (run,) = load_runs([write_run(tmp_path / "run", intervals=LOGGED)])
    row = measure("M", run)
    assert row["updates_per_second"] == statistics.median([4, 2.5, 3]) and row["peak_gb"] == 3.5
    assert row["tokens_per_second"] == statistics.median([800, 500, 700]) and row["wall_seconds"] == 120
    assert (row["parameters_total"], row["parameters_active"], row["updates"]) == (500, 200, 4)


def test_a_models_memory_is_that_of_its_largest_run(tmp_path):
    """The speed is the mean; a run without the number counts for neither. Without any there is a dash."""
    larger = [{**values, "peak_gb": 4.75, "ups": 10} for values in LOGGED]
    plain = [{"ppl": 30, "ups": 7} for _ in LOGGED]
    for seed, intervals in enumerate((LOGGED, larger, plain)):
        write_run(tmp_path / f"{seed}", {"name": "M"}, {"common.seed": seed}, intervals=intervals)
    table = compare([tmp_path], "T").of_models
    assert table["peak_gb"][0] == 4.75 and table["updates_per_second"][0] == pytest.approx((3 + 10 + 7) / 3)
    (cells,) = for_readers(compare([tmp_path / "0", tmp_path / "1"], "T").of_models).to_dict("records")
    assert (cells["Peak memory"], cells["Updates/s"], cells["Seeds"]) == ("4.75 GB", "6.5", "2")
    (cells,) = for_readers(compare([tmp_path / "2"], "T").of_models).to_dict("records")
    assert cells["Peak memory"] == "–"


def save(folder, name="checkpoint_best.pt", **changed):
    """Save a checkpoint without weights that says what a run's log says, but for what changed."""
    said = {"num_experts": 4, "router": "hash", "dictionary_fingerprint": "d" * 64, "table_fingerprint": "t" * 64}
    manifest = Manifest(save="s", update=4, **(said | changed))
    torch.save({"model": {}, KEY: manifest.to_plain()}, folder / name)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"num_experts": 8}, "the number of experts is 4 in its log, but 8 in checkpoint_best.pt"),
        ({"router": "base"}, "the router is hash in its log, but base in checkpoint_best.pt"),
        (
            {"dictionary_fingerprint": "e" * 64},
            f"the dictionary fingerprint is {'d' * 12} in its log, but {'e' * 12} in checkpoint_best.pt",
        ),
        (
            {"table_fingerprint": "u" * 64},
            f"the hash table fingerprint is {'t' * 12} in its log, but {'u' * 12} in checkpoint_best.pt",
        ),
        ({"table_fingerprint": None}, None),
    ],
)
def test_a_checkpoint_that_contradicts_the_log(tmp_path, changed, reason):
    run = write_run(tmp_path / "run", table_fingerprint="t" * 64)
    save(run, **changed)
    save(run, "checkpoint_last.pt", num_experts=99)  # not the one that was evaluated
    compared, reasons = sort_out(load_runs([run]))
    assert reasons == ({run: reason} if reason else {}) and len(compared) == (reason is None)


def test_checkpoints_that_say_nothing(tmp_path):
    """Of fairseq itself, damaged, or none: the logs stand."""
    run = write_run(tmp_path / "run")
    torch.save({"model": {}}, run / "checkpoint_best.pt")
    assert sort_out(load_runs([run]))[1] == {}
    (run / "checkpoint_best.pt").write_bytes(b"PK\x03\x04 torn")
    assert sort_out(load_runs([run]))[1] == {}
