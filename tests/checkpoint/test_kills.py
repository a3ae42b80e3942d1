"""Trainings killed at random moments around saving: what is there is whole, and the next one goes on from it.

Two ranks that share experts save after every update. A kill is of one rank (the watchdog ends the other) or of all.
`bash scripts/test.sh -m slow tests/checkpoint/test_kills.py -n 0 -s` shows what each of 20 kills left. Those are of
real commands; `benchmarks/kills.py` kills a thousand times without fairseq's start, and this file has a short dose.
"""

import random
import time

import pytest
import torch
from forked import run_python, start_python
from hydra_configs import ROOT
from plugin import train, train_arguments
from saved_checkpoints import referenced

from fairseq_hash.cli import main as fairseq_hash_command

RANKS = 2
SPARSE = ("--router", "hash", "--num-experts", "8", "--sparse-layers", "0,1", "--disable-validation")
SPARSE += ("--decoder-embed-dim", "128", "--decoder-ffn-embed-dim", "1024")  # a save takes longer than an update
SAVING = ("--max-update", "100000", "--save-interval-updates", "1", "--keep-interval-updates", "2")
SAVING += ("--distributed-world-size", str(RANKS), "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp")


def start_ranks(data, folder, logs):
    """Start all ranks of a training that goes on from what is in the folder."""
    logs.mkdir(exist_ok=True)
    meeting = f"file://{logs}/meeting"
    processes = []
    for rank in range(RANKS):
        own = ("--distributed-init-method", meeting, "--distributed-rank", str(rank), "--distributed-no-spawn")
        words = ["-m", "fairseq_cli.train", *train_arguments(data, folder, *SPARSE, *SAVING, *own)]
        said = logs / f"{rank}.txt"
        processes.append(start_python(words, said, said, logs, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
    return processes


def newest_update(folder):
    """Return the number of updates of the newest checkpoint."""
    updates = [torch.load(path, weights_only=True)["fairseq_hash"]["update"] for path in folder.glob("*.pt")]
    return max(updates, default=0)  # a folder that is not there has no files


def kill_and_look(data, folder, logs, generator, kills_all):
    """Train on, kill, and check what is left; return what the next training starts from and leftovers of this one."""
    before = newest_update(folder)
    processes = start_ranks(data, folder, logs)
    try:
        said = logs / "0.txt"
        deadline = time.monotonic() + 120
        # The kill comes at some moment of the first, second or third save of this training.
        saves = generator.choice((1, 2, 3))
        while said.read_text().count("Preparing to save") < saves:
            assert time.monotonic() < deadline and processes[0].exitcode is None, said.read_text()[-3000:]
            time.sleep(0.005)
        if before:
            loaded = f"Loaded checkpoint {folder}/checkpoint_last.pt (epoch"
            assert loaded in said.read_text(), said.read_text()[-3000:]
        time.sleep(generator.uniform(0, 0.2))
        for process in processes if kills_all else [generator.choice(processes)]:
            process.kill()
        for process in processes:
            process.join(60)
            assert process.exitcode not in (0, None)
    finally:
        for process in processes:
            process.kill()
    leftovers = [path for path in folder.rglob("*") if path.is_file() and is_leftover(path, folder)]
    mains = sorted(folder.glob("*.pt"))
    if mains:
        assert fairseq_hash_command(["checkpoint", "verify", *map(str, mains)]) == 0
        assert newest_update(folder) >= before
    return newest_update(folder), [path.name for path in leftovers]


def is_leftover(path, folder):
    """Return whether a file belongs to no checkpoint."""
    is_shard = path.name.endswith(".safetensors")
    return path.name.endswith(".partial") or (is_shard and path.name not in referenced(folder))


def kill_often(data, tmp_path, kills, seed):
    """Kill trainings that go on from each other; check that leftovers of each are gone after the next start."""
    generator = random.Random(seed)
    folder, left = tmp_path / "saved", []
    for number in range(kills):
        kills_all = number % 2 == 1
        start = newest_update(folder)
        update, leftovers = kill_and_look(data, folder, tmp_path / f"{number}", generator, kills_all)
        assert not set(left) & set(leftovers)
        left = leftovers
        who = "all ranks" if kills_all else "one rank"
        print(f"\nkill {number + 1}, of {who}: from update {start} to {update}, leftovers: {', '.join(left) or 'none'}")
    update = newest_update(folder)
    done = train(data, folder, *SPARSE, "--max-update", str(update + 1), "--save-interval-updates", "1")
    assert "no existing checkpoint" not in (done.stdout + done.stderr).lower() or not update
    assert newest_update(folder) == update + 1
    assert not [path for path in folder.rglob("*") if path.is_file() and is_leftover(path, folder)]


def test_kills_around_saving_leave_whole_checkpoints(data, tmp_path):
    kill_often(data, tmp_path, kills=3, seed=1)


@pytest.mark.slow
def test_twenty_kills(data, tmp_path):
    kill_often(data, tmp_path, kills=20, seed=2)


def test_short_dose_of_the_fast_kills(tmp_path):
    done = run_python([ROOT / "benchmarks" / "kills.py", "--kills", "12", "--seed", "3"], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| kills | 12 |" in done.stdout and "| saves lost | 0 |" in done.stdout
