"""Experts shared out over ranks: groups, the layer on several ranks, what it sends, and how BASE balances."""

import pytest
import ranks
import torch
import torch.nn.functional as F

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.experts import ExpertFeedForward, ExpertStack
from fairseq_hash.parallel.groups import ExpertParallel, choose_size, runs_of


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_layer_equals_naive_loop_and_moves_no_byte_more_than_it_must(world_size):
    ranks.run(world_size, "layer_ranks:layers", 30)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_layer_with_replicas_equals_naive_loop_and_copies_are_equal_to_the_bit(world_size):
    ranks.run(world_size, "layer_ranks:layers_with_replicas", 30)


@pytest.mark.parametrize("world_size", [2, 4])
def test_fairscale_dispatch_gives_the_same(world_size):
    ranks.run(world_size, "layer_ranks:fairscale", 30)


def test_routers_speak_fairscales_gate_interface():
    for difference in ranks.run(2, "layer_ranks:gate_in_fairscales_own_layer"):
        assert difference < 1e-6


@pytest.mark.parametrize("world_size", [2, 4])
def test_base_balances_over_the_batch_of_the_group(world_size):
    ranks.run(world_size, "layer_ranks:base", 20)


@pytest.mark.parametrize("world_size", [2, 4])
def test_sinkhorn_balances_over_the_batch_of_the_group(world_size):
    ranks.run(world_size, "layer_ranks:sinkhorn", 20)


def test_base_shuffles_anew_each_time():
    ((first, second), quality), ((other, _), other_quality) = ranks.run(2, "layer_ranks:shuffle_is_random")
    assert not torch.equal(first, second)
    assert torch.bincount(torch.cat([first, other])).tolist() == [32] * 4
    # Each token gets an expert for its own scores: those of another token would add up to about nothing.
    assert all(0.9 < value < 1.1 for value in quality + other_quality)


def interleaved(num_experts, size):
    """Expert e on rank e mod P."""
    return [expert for rank in range(size) for expert in range(rank, num_experts, size)]


@pytest.mark.parametrize(
    "make",
    [
        lambda ids: ExpertFeedForward(ids, 6, 8, F.relu, 0.0, (3,)),
        lambda ids: ExpertStack(ids, 2, 6, 8, F.relu, 0.0, 3),
    ],
)
def test_experts_start_the_same_wherever_they_are(make):
    torch.manual_seed(7)
    whole = dict(make(range(12)).named_parameters())
    for size in (1, 2, 3, 4, 6, 12):
        for place in range(size):
            parallel = ExpertParallel(12, size, place, size)
            torch.rand(place)  # what other ranks drew before does not matter
            for one in (parallel, parallel.placed(interleaved(12, size))):
                for name, parameter in make(one.expert_ids).named_parameters():
                    assert torch.equal(parameter, whole[name][list(one.expert_ids)])


@pytest.mark.parametrize(
    ("num_experts", "world_size", "size"),
    [(16, 4, 4), (4, 16, 4), (12, 8, 4), (5, 3, 1), (6, 9, 3), (1, 7, 1), (128, 512, 128)],
)
def test_largest_group_by_default(num_experts, world_size, size):
    assert choose_size(num_experts, world_size, 0) == size


@pytest.mark.parametrize(("num_experts", "world_size", "size"), [(3, 2, 2), (4, 3, 2), (4, 4, 3), (8, 4, 8)])
def test_group_that_does_not_divide_is_refused(num_experts, world_size, size):
    with pytest.raises(UserError, match=f"--expert-parallel-size {size} does not divide both .* use one of 1"):
        choose_size(num_experts, world_size, size)


def test_every_expert_is_held_once_in_each_group_and_saved_once():
    for world_size, size, num_experts in [(4, 2, 6), (6, 3, 3), (8, 8, 16), (8, 1, 3), (6, 2, 8)]:
        places = [ExpertParallel(num_experts, size, rank, world_size) for rank in range(world_size)]
        for start in range(0, world_size, size):
            held = [expert for place in places[start : start + size] for expert in place.expert_ids]
            assert held == list(range(num_experts))
        for given in (places, [place.placed(interleaved(num_experts, size)) for place in places]):
            assert sorted(expert for place in given for expert in place.saved_experts) == list(range(num_experts))
            assert all(set(place.saved_experts) <= set(place.expert_ids) for place in given)


def test_slots_are_where_the_experts_of_an_order_are():
    place = ExpertParallel(6, 2, 1, 2)
    assert place.slot_of_expert(torch.device("cpu")) is None and place.placed(range(6)) == place
    placed = place.placed([0, 3, 4, 1, 2, 5])
    assert list(placed.expert_ids) == [1, 2, 5] and placed.slot_of_expert(torch.device("cpu")).tolist() == [
        0,
        3,
        4,
        1,
        2,
        5,
    ]
    segments = placed.in_segments(2)
    assert list(segments.expert_ids) == [2, 3, 4, 5, 10, 11]  # the segments of an expert beside one another
    assert segments.slot_of_expert(torch.device("cpu")).tolist() == [0, 1, 6, 7, 8, 9, 2, 3, 4, 5, 10, 11]
    assert runs_of([1, 2, 5]) == [range(1, 3), range(5, 6)] and runs_of(range(3)) == [range(3)] and runs_of([]) == []


# 4 experts on 3 ranks of 3 slots: expert 0 has three copies, 1, 2 and 3 two.
WITH_COPIES = (0, 1, 2, 0, 1, 3, 0, 2, 3)


def test_copies_are_known_and_of_each_the_first_counts():
    places = [ExpertParallel(4, 3, rank, 6).placed(WITH_COPIES) for rank in range(6)]
    assert places[0].copies == {0: (0, 1, 2), 1: (0, 1), 2: (0, 2), 3: (1, 2)}
    assert [list(place.expert_ids) for place in places] == [[0, 1, 2], [0, 1, 3], [0, 2, 3]] * 2
    assert [list(place.first_experts) for place in places] == [[0, 1, 2], [3], []] * 2
    assert sorted(expert for place in places for expert in place.saved_experts) == [0, 1, 2, 3]
    assert {(place.local_experts, place.num_replicas) for place in places} == {(3, 5)}
    assert ExpertParallel(4, 2, 0, 2).copies == ExpertParallel(4, 2, 0, 2).placed([0, 2, 1, 3]).copies == {}
    assert places[0].describe().startswith("2 groups of 3 ranks share 4 experts and 5 replicas: rank 0, 3: 0 to 2;")


@pytest.mark.parametrize("segments", [1, 2])
def test_senders_divide_the_rows_of_an_expert_evenly_among_its_copies(segments):
    """Row by row: a copy gets an equal part of each sender's rows, and what is left over goes to another one each."""
    generator, device = torch.Generator().manual_seed(0), torch.device("cpu")
    groups, slots = 4 * segments, [e * segments + n for e in WITH_COPIES for n in range(segments)]
    of_all = torch.zeros(len(slots), dtype=torch.int64)
    for sender in range(3):
        parallel = ExpertParallel(4, 3, sender, 3).placed(WITH_COPIES).in_segments(segments)
        rows_E = torch.randint(0, 6, (groups,), generator=generator)
        # A row's name is its expert and its number.
        names = torch.tensor([expert * 100 + row for expert in range(groups) for row in range(rows_E[expert])])
        rows_S, name_R = parallel.slots(device).by_slot(rows_E, names)
        parts = [part.tolist() for part in name_R.split(rows_S.tolist())]
        for expert in range(groups):
            of_expert = [parts[slot] for slot, other in enumerate(slots) if other == expert]
            sizes = [len(part) for part in of_expert]
            assert sorted(sum(of_expert, [])) == [expert * 100 + row for row in range(rows_E[expert])]
            assert all(part == sorted(part) for part in of_expert) and max(sizes) - min(sizes) <= 1
        assert parallel.slots(device).rows(torch.stack([rows_E, rows_E])).tolist() == [rows_S.tolist()] * 2
        of_all += parallel.slots(device).rows(torch.ones(groups, dtype=torch.int64))
    # Three senders with one row of expert 0 each: every copy has got one.
    assert [of_all[slot] for slot, expert in enumerate(slots) if expert // segments == 0] == [1] * 3 * segments


def test_log_says_who_holds_what():
    two = "2 groups of 2 ranks share 6 experts: rank 0, 2: 0 to 2; rank 1, 3: 3 to 5"
    assert ExpertParallel(6, 2, 0, 4).describe() == two
    assert ExpertParallel(64, 32, 0, 32).describe() == (
        "32 ranks share 64 experts: rank 0: 0 to 1; rank 1: 2 to 3; rank 2: 4 to 5; rank 3: 6 to 7; rank 4: 8 to 9; "
        "rank 5: 10 to 11; ...; rank 31: 62 to 63"
    )
    assert "rank 0, 4, ... 508: 0;" in ExpertParallel(4, 4, 0, 512).describe()
    placed = ExpertParallel(8, 2, 0, 2).placed([0, 1, 2, 5, 3, 4, 6, 7])
    assert placed.describe() == "2 ranks share 8 experts: rank 0: 0 to 2, 5; rank 1: 3 to 4, 6 to 7"
    assert ExpertParallel(12, 2, 0, 2).placed(interleaved(12, 2)).describe().endswith("rank 1: 1, 3, 5, ...")
    assert ExpertParallel(6, 1, 0, 3).describe() == "every rank of 3 holds all 6 experts"
