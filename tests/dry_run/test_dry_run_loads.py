"""Dry runs whose experts get rows by loads: the rows by hand, the fullest rank, its bytes, and what is refused."""

import numpy as np
import pytest
from called import call
from dry_run_ranks import experiment_of

from fairseq_hash.core.errors import UserError
from fairseq_hash.dry_run.collectives import ALL_TO_ALL
from fairseq_hash.dry_run.hardware import GPUS
from fairseq_hash.dry_run.loads import PlacedLoads, rows_by
from fairseq_hash.dry_run.update import batches_of, dry_run
from fairseq_hash.parallel.load_files import write_loads

SMALL = ("model.decoder_embed_dim=64", "model.decoder_ffn_embed_dim=256", "dataset.max_tokens=512")
SMALL += ("criterion.update_freq_ranks=0", "optimization.update_freq=[1]")
EXPERTS, RANKS = 16, 4


@pytest.fixture
def load_file(tmp_path):
    """Loads of 16 experts of layer 1: the first four are the busiest."""
    load_E = np.array([9, 7, 5, 3, *[1] * 12], dtype=float)
    path = tmp_path / "loads.csv"
    write_loads(path, {1: load_E}, np.zeros(EXPERTS, dtype=int))
    return path, load_E


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("segments", [1, 2])
def test_rows_are_whole_and_as_near_to_the_loads_as_can_be(seed, segments):
    random = np.random.default_rng(seed)
    load_E, choices = random.random(7) * (random.random(7) < 0.8) + 1e-9, int(random.integers(1, 500))
    (rows_G, *others) = rows_by(load_E)(3, 7 * segments, choices)
    assert others == [rows_G] * 2 and sum(rows_G) == choices
    exact_G = np.repeat(load_E / load_E.sum() / segments, segments) * choices
    assert (np.abs(np.array(rows_G) - exact_G) < 1).all()


def rows_of_rank(held, load_E, choices):
    """Return the rows that a rank gets of those of four, by a loop: each expert's from each of them."""
    share = {expert: load_E[expert] / load_E.sum() * choices for expert in range(EXPERTS)}
    return sum(RANKS * share[expert] for expert in held)


@pytest.mark.parametrize("placement", ["contiguous", "balanced"])
def test_the_fullest_rank_gets_its_rows(load_file, placement):
    path, load_E = load_file
    experiment = experiment_of("laptop/hash", [*SMALL, f"+model.expert_placement={placement}"])
    loads = PlacedLoads.of(experiment, RANKS, path)
    held = {rank: loads.place.experts_at(rank) for rank in range(RANKS)}
    of_rank = {rank: sum(load_E[list(held[rank])]) for rank in held}
    assert loads.fullest == max(of_rank, key=of_rank.get)
    assert loads.factor == pytest.approx(max(of_rank.values()) / np.mean(list(of_rank.values())))
    assert loads.factor == pytest.approx(24 / 9 if placement == "contiguous" else 12 / 9)

    choices = batches_of(experiment.config).tokens
    for rank in (loads.fullest, (loads.fullest + 1) % RANKS):
        of = dry_run(loads.experiment, RANKS, rank, GPUS["h100"], loads.rows)
        # Back from the experts goes what they got, 64 numbers of 4 bytes a row.
        back = [call for call in of.calls if call.kind == ALL_TO_ALL and call.bytes > 4000]
        got = {round(sum(call.sent_P) / 256) for call in back}
        assert any(abs(rows - rows_of_rank(held[rank], load_E, choices)) <= EXPERTS for rows in got), got


def test_a_fuller_rank_holds_more(load_file):
    path, _ = load_file
    experiment = experiment_of("laptop/hash", list(SMALL))
    loads = PlacedLoads.of(experiment, RANKS, path)
    even, full, empty = (
        dry_run(experiment, RANKS, 0, GPUS["h100"]).peak["activations"],
        *(dry_run(loads.experiment, RANKS, rank, GPUS["h100"], loads.rows).peak["activations"] for rank in (0, 3)),
    )
    assert loads.fullest == 0 and full > even > empty


def test_the_command_says_which_rank_and_by_what(load_file):
    path, _ = load_file
    words = ("plan", "--config-name", "laptop/hash", "--ranks", RANKS, "--dry-run", *SMALL)
    status, out, _ = call(*words, "--load-file", path)
    text = " ".join(out.split())
    assert status == 0 and "rank 0 of 4" in text and "rank 0 has 2.67 times the mean of its group, the most" in text
    status, out, _ = call(*words, "--load-file", path, "--rank", 2)
    assert status == 0 and "rank 2 of 4" in out


def test_what_does_not_go_is_one_line(load_file, tmp_path):
    path, _ = load_file
    with pytest.raises(UserError, match="with --ranks 1 no experts are shared"):
        PlacedLoads.of(experiment_of("laptop/hash", list(SMALL)), 1, path)
    with pytest.raises(UserError, match="cannot read"):
        PlacedLoads.of(experiment_of("laptop/hash", list(SMALL)), RANKS, tmp_path / "none.csv")
    status, _, err = call("plan", "--config-name", "laptop/hash", "--load-file", path)
    assert status != 0 and "--load-file goes with --dry-run; add --dry-run, or leave it out" in err
