"""What several ranks do with a sparse layer whose experts they share; `ranks` runs these functions.

Every rank draws the same examples (hypothesis, derandomized), so it knows the tokens of all others and checks its own
part against the naive loop over the tokens of the whole group.
"""

import copy
import math

import numpy as np
import pytest
import ranks
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn import MOELayer
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.balanced_assignment import balanced_assignment
from fairseq_hash.moe.dispatch_plan import random_order
from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.distributed_assignment import balance_over
from fairseq_hash.moe.experts import ExpertFeedForward
from fairseq_hash.moe.fairscale_dispatcher import Gate
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routers import SinkhornRouter, SwitchRouter
from fairseq_hash.moe.routers.sinkhorn import add_up_over
from fairseq_hash.moe.routing_context import HashRoute, RoutingContext
from fairseq_hash.moe.routing_stats import RoutingReport
from fairseq_hash.parallel.collectives import gather
from fairseq_hash.parallel.gradients import add_up_copies, norm_with_experts
from fairseq_hash.parallel.groups import ExpertParallel, expert_parallel

WIDTH, HIDDEN = 5, 7
# fp32 against fp64: sums of some tens of products.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


@st.composite
def layouts(draw, world_size, has_replicas):
    """Experts, ranks of a group, tokens of each rank, choices a token, capacity factor and who is dropped, seed."""
    size = draw(st.sampled_from([n for n in range(2, world_size + 1) if world_size % n == 0]))
    return {
        "size": size,
        "num_experts": size * draw(st.integers(1, 3)),
        "tokens": draw(st.lists(st.integers(0, 9), min_size=world_size, max_size=world_size)),
        "choices": draw(st.integers(1, 2)),
        "capacity_factor": draw(st.sampled_from([0.0, 0.0, 0.7, 0.7])),
        "drops_randomly": draw(st.booleans()),
        # Which experts get tokens at all: with few of them, whole ranks get none.
        "busy": draw(st.integers(1, 3 * size)),
        "is_placed": has_replicas or draw(st.booleans()),
        # Of each rank.
        "replicas": draw(st.sampled_from([2, 1])) if has_replicas else 0,
        "seed": draw(st.integers(0, 2**16)),
    }


def random_layouts(check, examples, has_replicas=False):
    """Run `check` on random layouts, the same ones on every rank."""

    # Without shrinking: a rank that fails leaves, and the others with it.
    @settings(max_examples=examples, database=None, derandomize=True, deadline=None, phases=[Phase.generate])
    @given(layouts(dist.get_world_size(), has_replicas))
    def run(layout):
        assert gather(layout) == [layout] * dist.get_world_size(), "ranks drew different examples"
        check(layout)

    run()


def share_out(layout):
    """Return who holds which experts: the next ones, or random ones, and copies of some that others hold."""
    parallel = expert_parallel(layout["num_experts"], layout["size"])
    if not layout["is_placed"]:
        return parallel
    generator = torch.Generator().manual_seed(layout["seed"])
    held = torch.randperm(layout["num_experts"], generator=generator).view(layout["size"], -1).tolist()
    for own in held:
        drawn = torch.randperm(layout["num_experts"], generator=generator).tolist()
        own.extend([expert for expert in drawn if expert not in own][: layout["replicas"]])
    order = [expert for own in held for expert in sorted(own)]
    placed = parallel.placed(order)
    assert [expert for place in range(layout["size"]) for expert in placed.experts_at(place)] == order
    return placed


def make_tokens(layout):
    """Return each rank's activations, choices and their weights."""
    generator = torch.Generator().manual_seed(layout["seed"])
    experts, choices = layout["num_experts"], layout["choices"]
    busy = torch.randperm(experts, generator=generator)[: layout["busy"]]
    made = []
    for tokens in layout["tokens"]:
        expert_TK = busy[torch.randint(len(busy), (tokens, choices), generator=generator)]
        x_TD = torch.randn(tokens, WIDTH, generator=generator)
        made.append((x_TD, expert_TK, torch.rand(tokens, choices, generator=generator)))
    return made


def order_of(layout, rank):
    """Return the order in which a rank's choices come to their experts; None: as they are."""
    if not layout["drops_randomly"]:
        return None
    torch.manual_seed(layout["seed"] + rank)
    choices = layout["choices"]
    tokens = torch.randperm(layout["tokens"][rank], device=ranks.device()).tolist()
    return [token * choices + k for token in tokens for k in range(choices)]


def homes_of(layout, parallel, other, chosen, kept):
    """Return the place of the rank that serves each choice of a rank of the group; of a dropped one, any.

    Who sends n rows to an expert cuts them, as the expert takes them, into a part for each of its copies: as
    `numpy.array_split`. Which copy has the first part depends on who sends.
    """
    order = (layout["capacity_factor"] and order_of(layout, other)) or range(len(chosen))
    homes = [0] * len(chosen)
    for expert in range(layout["num_experts"]):
        places = [place for place in range(parallel.size) if expert in parallel.experts_at(place)]
        taken = [choice for choice in order if chosen[choice] == expert and kept[choice]]
        for number, place in enumerate(places):
            part = (number + other % parallel.size) % len(places)
            for choice in np.array_split(np.array(taken, dtype=int), len(places))[part]:
                homes[choice] = place
    return homes


def all_experts(num_experts):
    """Return the experts as one process has them."""
    torch.manual_seed(1)
    return ExpertFeedForward(range(num_experts), WIDTH, HIDDEN, F.gelu, 0.0, (0,))


def check_against_loop(layout):
    """Output, gradients and bytes moved of one layer, forward and backward."""
    rank, choices, factor = dist.get_rank(), layout["choices"], layout["capacity_factor"]
    parallel = share_out(layout)
    assert bool(parallel.copies) == (layout["replicas"] > 0)
    torch.manual_seed(1)
    experts = ExpertFeedForward(parallel.expert_ids, WIDTH, HIDDEN, F.gelu, 0.0, (0,))
    layer = SparseLayer(None, experts, make_dispatcher(parallel), factor, factor, hash_route=0)
    made = make_tokens(layout)
    experts.to(ranks.device())
    x_TD, expert_TK, weight_TK = (value.to(ranks.device()) for value in made[rank])
    x_TD, weight_TK = x_TD.requires_grad_(), weight_TK.requires_grad_()
    with count_sent_bytes(parallel) as sent:
        torch.manual_seed(layout["seed"] + rank)
        order_C = random_order(expert_TK) if layout["drops_randomly"] and factor else None
        under_way = make_dispatcher(parallel).begin(expert_TK, factor, order_C)
        route = Assignment(expert_TK, weight_TK), under_way
        y_LBD, report = layer(x_TD.unsqueeze(1), RoutingContext(None, [HashRoute(*route)]))
        (y_LBD * y_LBD.detach().cos()).sum().backward()
    chosen_E = torch.bincount(expert_TK.flatten(), minlength=layout["num_experts"])
    assert torch.equal(RoutingReport(report).tokens_per_expert_E.long(), chosen_E)

    whole = all_experts(layout["num_experts"])
    whole = {name: p.detach().double().requires_grad_() for name, p in whole.named_parameters()}
    start = rank - parallel.place
    sent_rows = received_rows = 0
    total = 0 * sum(p.sum() for p in whole.values())  # where no rank has tokens, all gradients are zero
    for other in range(start, start + parallel.size):
        x, expert, weight = (value.detach() for value in made[other])
        x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
        chosen = expert.flatten().tolist()
        kept = reference.kept_under_capacity(chosen, layout["num_experts"], factor, order_of(layout, other))
        homes = homes_of(layout, parallel, other, chosen, kept)
        for home, is_kept in zip(homes, kept, strict=True):
            sent_rows += is_kept and other == rank and home != parallel.place
            received_rows += is_kept and other != rank and home == parallel.place
        y = torch.zeros_like(x)
        for k in range(choices):
            if len(x):
                y = y + reference.sparse_layer(x, expert[:, k].tolist(), weight[:, k], kept[k::choices], whole, F.gelu)
        total = total + (y * y.detach().cos()).sum()
        if other == rank:
            mine = y, x, weight
    total.backward()
    y, x, weight = mine
    torch.testing.assert_close(y_LBD.squeeze(1).cpu(), y.float(), **TOLERANCE)
    torch.testing.assert_close(gradient(x_TD), gradient(x), **TOLERANCE)
    torch.testing.assert_close(gradient(weight_TK), gradient(weight), **TOLERANCE)
    square = 0.0
    for name, parameter in experts.named_parameters():
        if parallel.copies:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            add_up_copies(parameter.grad, parallel)
        own = gradient(whole[name])[list(parallel.expert_ids)]
        torch.testing.assert_close(gradient(parameter), own, **TOLERANCE)
        square += float(gradient(whole[name]).square().sum())
        check_copies_are_equal(gradient(parameter), parallel)
    found = norm_with_experts(torch.tensor(2.0), [gradient(p) for p in experts.parameters()], parallel)
    assert float(found) == pytest.approx(math.sqrt(4 + square), rel=1e-4)

    # Dispatch and the backward pass of combine send this rank's rows; combine and the backward pass of dispatch those
    # that came from others.
    rows = 2 * sent_rows + 2 * received_rows
    assert (parallel.traffic.rows, parallel.traffic.bytes) == (rows, rows * WIDTH * 4)
    slots = layout["num_experts"] + parallel.num_replicas
    assert sent == {"rows": rows * WIDTH * 4, "split sizes": 8 * (slots - parallel.local_experts)}
    assert parallel.traffic.split_exchanges == 1


def check_copies_are_equal(grad_e, parallel):
    """All copies of an expert in the group have the same gradient, to the bit."""
    mine = dict(zip(parallel.expert_ids, grad_e, strict=True))
    start = dist.get_rank() - parallel.place
    of_group = gather({expert: row.tolist() for expert, row in mine.items()})[start : start + parallel.size]
    for expert, places in parallel.copies.items():
        assert len(places) > 1
        assert all(of_group[place][expert] == of_group[places[0]][expert] for place in places)


def gradient(tensor):
    """Return a gradient in fp32 on the CPU; zero where there is none."""
    return (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad).float().cpu()


class count_sent_bytes:
    """Count what really goes through `all_to_all_single` to other ranks."""

    def __init__(self, parallel):
        self.parallel = parallel
        self.sent = {"rows": 0, "split sizes": 0}

    def __enter__(self):
        self.original = dist.all_to_all_single
        dist.all_to_all_single = self.count
        return self.sent

    def __exit__(self, *error):
        dist.all_to_all_single = self.original

    def count(self, output, given, output_split_sizes=None, input_split_sizes=None, **others):
        size = self.parallel.size
        splits = input_split_sizes or [len(given) // size] * size
        leaving = sum(splits) - splits[self.parallel.place]
        kind = "rows" if given.is_floating_point() else "split sizes"
        self.sent[kind] += leaving * math.prod(given.shape[1:]) * given.element_size()
        return self.original(output, given, output_split_sizes, input_split_sizes, **others)


def check_fairscale(layout):
    """fairscale's `MOELayer` gives the same output and gradients as our exchange, dropped choices included."""
    made = [value.to(ranks.device()) for value in make_tokens(layout)[dist.get_rank()]]
    found = []
    for way in ("all-to-all", "fairscale"):
        parallel = share_out(layout)
        dispatcher = make_dispatcher(parallel, way)
        torch.manual_seed(1)
        experts = ExpertFeedForward(parallel.expert_ids, WIDTH, HIDDEN, F.gelu, 0.0, (0,)).to(ranks.device())
        layer = SparseLayer(None, experts, dispatcher, *[layout["capacity_factor"]] * 2, hash_route=0)
        x_TD, expert_TK, weight_TK = made[0].clone().requires_grad_(), made[1], made[2].clone().requires_grad_()
        capacity, drops_randomly = layout["capacity_factor"], layout["drops_randomly"]
        order_C = random_order(expert_TK) if drops_randomly and capacity else None
        under_way = dispatcher.begin(expert_TK, capacity, order_C)
        route = Assignment(expert_TK, weight_TK), under_way
        y_LBD, report = layer(x_TD.unsqueeze(1), RoutingContext(None, [HashRoute(*route)]))
        (y_LBD * y_LBD.detach().cos()).sum().backward()
        gradients = [gradient(tensor) for tensor in (x_TD, weight_TK, *experts.parameters())]
        found.append([y_LBD, report, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def fairscale(examples):
    """Check random layouts."""
    random_layouts(check_fairscale, examples)


def gate_in_fairscales_own_layer():
    """Return the largest difference between our layer and a `MOELayer` of plain modules with a Switch router's gate."""
    parallel = expert_parallel(4, 0)
    torch.manual_seed(1)
    experts = ExpertFeedForward(parallel.expert_ids, WIDTH, HIDDEN, F.gelu, 0.0, (0,))
    router = SwitchRouter(WIDTH, 4, 0.0, 0)

    def module(number):
        first, second = torch.nn.Linear(WIDTH, HIDDEN), torch.nn.Linear(HIDDEN, WIDTH)
        with torch.no_grad():
            for linear, name in ((first, "fc1"), (second, "fc2")):
                linear.weight.copy_(getattr(experts, f"{name}_weight")[number])
                linear.bias.copy_(getattr(experts, f"{name}_bias")[number])
        return torch.nn.Sequential(first, torch.nn.GELU(), second)

    def route(x_TD):
        assignment = router(x_TD)
        return assignment, make_dispatcher(ExpertParallel(4)).begin(assignment.expert_TK, 0.0).plan

    modules = torch.nn.ModuleList(module(number) for number in range(parallel.local_experts))
    theirs = MOELayer(Gate(route, parallel.group), modules, parallel.group).to(ranks.device())
    ours = SparseLayer(router, experts, make_dispatcher(parallel)).to(ranks.device())
    torch.manual_seed(dist.get_rank())
    x_LBD = torch.randn(6, 2, WIDTH).to(ranks.device())
    y_LBD, _ = ours(x_LBD, RoutingContext(None))
    return (y_LBD - theirs(x_LBD)).abs().max().item()


def check_base(layout):
    """The balanced assignment of a group is that of one process with all its tokens; a shuffled one is balanced."""
    parallel = expert_parallel(layout["num_experts"], layout["size"])
    generator = torch.Generator().manual_seed(layout["seed"])
    shapes = [(tokens, layout["num_experts"]) for tokens in layout["tokens"]]
    scores = [torch.randn(shape, generator=generator).to(ranks.device()) for shape in shapes]
    rank, start = dist.get_rank(), dist.get_rank() - parallel.place
    of_group = scores[start : start + parallel.size]
    first = sum(map(len, scores[start:rank]))
    expected_N = balanced_assignment(torch.cat(of_group))
    expert_T = balance_over("global", parallel)(scores[rank])
    assert torch.equal(expert_T, expected_N[first : first + len(scores[rank])])
    assert torch.equal(balance_over("local", parallel)(scores[rank]), balanced_assignment(scores[rank]))

    expert_T = balance_over("shuffle", parallel)(scores[rank])
    assert expert_T.shape == (len(scores[rank]),)
    load_E = torch.bincount(expert_T, minlength=layout["num_experts"])
    dist.all_reduce(load_E, group=parallel.group)
    # Each rank of the group solves a problem of its own.
    assert load_E.max() - load_E.min() <= parallel.size


def check_sinkhorn(layout):
    """A group assigns its tokens, some of its ranks having none, as one process does that has them all."""
    parallel = expert_parallel(layout["num_experts"], layout["size"])
    generator = torch.Generator().manual_seed(layout["seed"])
    batches = [torch.randn(tokens, WIDTH, generator=generator) for tokens in layout["tokens"]]
    rank, start = dist.get_rank(), dist.get_rank() - parallel.place
    for balance, begin, end in (("global", start, start + parallel.size), ("local", rank, rank + 1)):
        alone = SinkhornRouter(WIDTH, layout["num_experts"], 0, 30, 1e-4)
        torch.nn.init.normal_(alone.centroids, generator=torch.Generator().manual_seed(layout["seed"]))
        shared = copy.deepcopy(alone).to(ranks.device())
        shared.add_up = add_up_over(balance, parallel)
        expected, found = alone(torch.cat(batches[begin:end])), shared(batches[rank].to(ranks.device()))
        first = sum(map(len, batches[begin:rank]))
        own = slice(first, first + len(batches[rank]))
        assert torch.equal(found.expert_TK.cpu(), expected.expert_TK[own])
        torch.testing.assert_close(found.weight_TK.cpu(), expected.weight_TK[own])
        assert found.statistics.sinkhorn_iterations.cpu() == expected.statistics.sinkhorn_iterations


def layers(examples):
    """Check random layouts of one layer."""
    random_layouts(check_against_loop, examples)


def layers_with_replicas(examples):
    """Check random layouts of one layer whose experts have copies."""
    random_layouts(check_against_loop, examples, has_replicas=True)


def base(examples):
    """Check random scores."""
    random_layouts(check_base, examples)


def sinkhorn(examples):
    """Check random tokens."""
    random_layouts(check_sinkhorn, examples)


def shuffle_is_random():
    """Return the shuffled assignments of the same scores, twice, on this rank, and their scores over the best ones'."""
    parallel = expert_parallel(4, 0)
    torch.manual_seed(dist.get_rank())
    score_TE = torch.randn(64, 4).to(ranks.device())
    assign = balance_over("shuffle", parallel)
    torch.manual_seed(3)
    assigned = [assign(score_TE) for _ in range(2)]
    best = score_TE.gather(1, balance_over("global", parallel)(score_TE).unsqueeze(1)).sum()
    quality = [(score_TE.gather(1, expert_T.unsqueeze(1)).sum() / best).item() for expert_T in assigned]
    return [expert_T.cpu() for expert_T in assigned], quality
