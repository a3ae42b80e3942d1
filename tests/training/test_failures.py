"""A job never hangs: whatever happens to one rank, all end, and one line says which rank and why.

Real processes of `fairseq-train` whose ranks share experts. No test looks at the time: a rank that has not ended in
`LIMIT` seconds, several times the stated ones, has hung.
"""

import pickle
import re

import pytest
from failing_ranks import FAILURES, SHARED, assert_one_line, finish, messages, run_hydra_ranks, run_ranks, start
from fairseq.data import Dictionary
from hydra_configs import needs_current_hydra
from plugin import swap_words, train_arguments

from fairseq_hash.fairseq_patches import registry
from fairseq_hash.hashing import TableShape, build_table, save_table
from fairseq_hash.parallel import watchdog

GONE = "ended without a word (killed, or its machine is gone)"
SILENT = "no sign of life for 5 s (killed, or its machine is gone)"
OUT_OF_MEMORY = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


# How a rank fails, which rank, of how many, and the one message.
FAILING = [
    ("killed", 1, 3, f"rank 1: {GONE}"),
    ("killed", 0, 3, f"rank 0: {GONE}, and with it the store it kept"),
    ("silent", 2, 3, f"rank 2: {SILENT}"),
    ("silent", 0, 2, f"rank 0: {SILENT}, and with it the store it kept"),
    ("error", 1, 2, "rank 1: ValueError: made for the test"),
    ("outside", 1, 2, "rank 1: ValueError: made for the test"),
    ("memory", 1, 2, f"rank 1: {OUT_OF_MEMORY}"),
    ("nan", 1, 2, "rank 1: the loss is NaN or infinite"),
    ("expert", 1, 2, "rank 0, 1: the loss is NaN or infinite; not finite: the weights of expert 5 of layer 1"),
]


QUICK = {("killed", 1), ("silent", 0), ("error", 1), ("nan", 1), ("expert", 1)}


@pytest.mark.parametrize(
    ("how", "rank", "world_size", "message"),
    [
        pytest.param(*case, id="{}-{}-of-{}".format(*case), marks=[] if case[:2] in QUICK else [pytest.mark.slow])
        for case in FAILING
    ],
)
def test_a_failing_rank_ends_the_job(data, tmp_path, how, rank, world_size, message):
    said = run_ranks(tmp_path, [data] * world_size, failure=(how, rank))
    assert [text for _, text in messages(said)] == [message], "\n".join(err[-2000:] for err in said)
    assert ('"num_updates": "2"' in said[0]) == (how != "outside")
    assert "attempting to recover" not in "".join(said)
    # An unexpected error shows its traceback, too, on the rank that met it and on no other.
    for other, err in enumerate(said):
        if other == rank and how in ("killed", "silent"):
            continue  # its data loader's processes may complain
        assert bool(re.search("^Traceback", err, re.M)) == (how in ("error", "outside") and other == rank)


@needs_current_hydra
@pytest.mark.parametrize(
    ("how", "message"),
    [("killed-after", GONE), pytest.param("outside", "ValueError: made for the test", marks=pytest.mark.slow)],
    ids=["killed", "outside"],
)
def test_a_failing_rank_ends_the_job_under_hydra(data, tmp_path, how, message):
    """Hydra catches errors, and ends its own process alone; an exchange also breaks outside of a step."""
    said = run_hydra_ranks(tmp_path, data, (how, 1))
    assert [text for _, text in messages(said)] == [f"rank 1: {message}"], "\n".join(err[-2000:] for err in said)


def command_of_two_ranks(cfg):
    """Fail as a command that is started by its name."""
    raise ValueError(cfg)


def test_processes_that_torch_spawns_end_the_job_too(monkeypatch):
    """`spawn` sends what it calls to other processes, where no override has been applied yet."""
    sent = []

    class Watchdog:
        def fail(self, error):
            raise SystemExit(f"the job ends: {error}")

    def call_main(cfg, main, **kwargs):
        sent.append(pickle.loads(pickle.dumps(main)))

    override = next(entry for entry in registry.overrides() if entry.module == "failures")
    override.function(call_main, "a configuration", command_of_two_ranks)
    with pytest.raises(ValueError, match="^a configuration$"):  # nobody waits yet
        sent[0]("a configuration")
    monkeypatch.setattr(watchdog, "_watchdogs", [Watchdog()])
    with pytest.raises(SystemExit, match="the job ends: a configuration"):
        sent[0]("a configuration")


def test_a_failing_rank_ends_the_job_under_a_launcher(data, tmp_path):
    """The launcher sees the failing rank end first, and ends."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    given = train_arguments(data, tmp_path / "saved", *SHARED)
    folder = tmp_path / "launcher"
    process = start([*launcher, FAILURES, "memory", "1", *given], folder)
    said = finish([process], [folder])
    assert messages(said) == [(0, f"rank 1: {OUT_OF_MEMORY}")], said[0][-3000:]
    assert re.search(r"Root Cause.*\n(.*\n){0,3}.*rank +: 1 ", said[0]), said[0][-3000:]


@pytest.mark.parametrize(
    ("world_size", "arguments", "message"),
    [
        (2, "--num-experts 3", "--expert-parallel-size 2 does not divide both the 2 ranks and the 3 experts; use "),
        (3, "", "--expert-parallel-size 2 does not divide both the 3 ranks and the 6 experts; use one of 1, 3, or "),
        (2, "--fp16", "--fp16 flattens all gradients into one, experts and others; add --fp16-no-flatten-grads, or "),
        (2, "--ddp-backend slowmo", "--ddp-backend slowmo does not go with shared experts; use "),
        (2, "--ddp-backend fully_sharded", "--ddp-backend fully_sharded needs CUDA; use legacy_ddp or pytorch_ddp "),
    ],
    ids=["experts", "world", "fp16", "backend", "fully_sharded"],
)
def test_options_that_do_not_go_end_all_ranks(data, tmp_path, world_size, arguments, message):
    said = run_ranks(tmp_path, [data] * world_size, "--expert-parallel-size", "2", *arguments.split())
    assert_one_line(said, re.escape(message) + ".*")


def test_a_rank_with_another_dictionary_ends_all_ranks(data, tmp_path):
    said = run_ranks(tmp_path, [data, swap_words(data, tmp_path / "other")])
    assert_one_line(said, r"rank 1 has dictionary_fingerprint \w+, rank 0 has \w+; start every rank with the same .*")


def test_a_rank_with_another_table_ends_all_ranks(data, tmp_path):
    """The same name of a file means another table on each rank, as on machines with their own discs."""
    symbols = Dictionary.load(str(data / "dict.txt")).symbols
    for rank in range(2):
        (tmp_path / f"rank {rank}").mkdir()
        table = build_table("random", symbols, [1] * len(symbols), TableShape(6), seed=rank)
        save_table(table, tmp_path / f"rank {rank}" / "table")
    said = run_ranks(tmp_path, [data, data], "--hash-table", "table")
    assert_one_line(said, r"rank 1 has table_fingerprint \w+, rank 0 has \w+; start every rank with the same .*")
