"""Runs and checkpoints that the package made before its modules moved (commit c280e67): they load, resume and report.

`before_the_move/runs.tar.xz` holds the data, and a dense, a Hash and a Switch run of 8 updates of the tiny model of
`plugin` with their logs, evaluations and last checkpoint. Two processes trained Hash, with four experts that they
share. `resumed.json` is what updates 9 to 12 were with the same code, `results.csv` its report.
"""

import json
import re
import tarfile
from pathlib import Path

import pandas as pd
import pytest
from called import call
from plugin import USER_DIR, command, on_ranks, records, train_arguments

ARCHIVE = Path(__file__).parent / "before_the_move" / "runs.tar.xz"
ROUTERS = {
    "hash": ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1", "--experts-per-token", "2"),
    "switch": ("--router", "switch", "--num-experts", "4", "--sparse-layers", "1"),
    "dense": ("--router", "none"),
}


@pytest.fixture
def before(tmp_path):
    """The folder of what was made before."""
    with tarfile.open(ARCHIVE) as archive:
        # Python 3.11.0 to 3.11.3 have no filters; the archive is our own.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return tmp_path


@pytest.mark.parametrize("name", [*ROUTERS, "hash, placed"])
def test_training_goes_on(before, tmp_path, name):
    """On as many processes as it was trained on, with the losses and gradient norms of then, as they were printed.

    Then there was no placement of experts.
    """
    name, _, is_placed = name.partition(", ")
    run = before / "runs" / name
    (run / "checkpoint_best.pt").rename(run / "checkpoint_last.pt")
    options = ("--no-save", "--disable-validation", "--num-workers", "0", "--max-update", "12")
    if is_placed:
        loads = tmp_path / "loads.csv"  # the first and the last expert share a rank
        loads.write_text("layer,expert,load\n0,0,5\n0,1,4\n0,2,2\n0,3,1\n")
        options += ("--expert-placement", loads)
    arguments = train_arguments(before / "data", run, *ROUTERS[name], *options)
    if name == "hash":
        done, other = on_ranks(2, "-m", "fairseq_cli.train", *arguments)
        assert done.returncode == other.returncode == 0, done.stderr[-3000:]
        assert ("rank 0: 0, 3; rank 1: 1 to 2" in done.stderr + other.stderr) == bool(is_placed)
    else:
        done = command("train", *arguments)
    expected = json.loads((before / "resumed.json").read_text())[name]
    found = {record["num_updates"]: record for record in records(done, "train_inner")}
    assert list(found) == list(expected) == ["9", "10", "11", "12"]
    for update, values in expected.items():
        for key, value in values.items():
            assert float(found[update][key]) == pytest.approx(float(value), abs=3e-3), (update, key)


@pytest.mark.parametrize("name", ROUTERS)
def test_evaluation_is_the_same(before, name):
    """By one process, to the last printed digit but one; every row of the shards is as it was written."""
    path = before / "runs" / name / "checkpoint_best.pt"
    options = ("--user-dir", USER_DIR, "--path", path, "--gen-subset", "test", "--cpu", "--num-workers", "0")
    done = command("eval_lm", before / "data", *options)
    found = float(re.search(r"Perplexity: (\S+)", done.stdout + done.stderr)[1])
    logged = float(re.search(r"Perplexity: (\S+)", (path.parent / "eval-test.log").read_text())[1])
    assert found == pytest.approx(logged, abs=0.02)
    status, _, err = call("checkpoint", "verify", path)
    assert status == 0, err


def test_the_report_is_the_same(before):
    status, _, err = call("report", before / "runs", "--out", before / "report")
    assert status == 0 and "compared 3 runs of 3 models" in err
    found, expected = (pd.read_csv(path) for path in (before / "report" / "results.csv", before / "results.csv"))
    pd.testing.assert_frame_equal(found[expected.columns], expected)
    # What routers log of their own is new in reports; the runs had it in their logs.
    new = {f"layer1_{name}_train" for name in ("router_entropy", "balance_loss", "z_loss")}
    assert set(found) - set(expected) == new
    assert found[sorted(new)].notna().sum().tolist() == [1, 1, 1]  # of Switch alone
