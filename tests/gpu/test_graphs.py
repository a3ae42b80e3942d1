"""A CUDA graph of a hash layer in bfloat16, from token ids to gradients: its shapes are static, and nothing waits."""

import pytest
import torch
import torch.nn.functional as F

from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.experts import ExpertFeedForward, GatedFeedForward
from fairseq_hash.moe.hash_weights import HashWeights
from fairseq_hash.moe.kernels.feed_forward import GPU_WAYS
from fairseq_hash.moe.kernels.group_sizes import GroupSizes
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routing_context import HashRoute, RoutingContext
from fairseq_hash.moe.routing_stats import RoutingReport
from fairseq_hash.moe.token_dispatcher import LocalDispatcher
from fairseq_hash.parallel.groups import ExpertParallel

EXPERTS, WIDTH, HIDDEN, TOKENS, VOCABULARY = 8, 64, 128, 96, 500


class Step:
    """Forward and backward of a layer, with the route made of token ids; all of it may be captured."""

    def __init__(self, layer, choices, device):
        generator = torch.Generator().manual_seed(choices)
        scores = torch.rand(VOCABULARY, EXPERTS, generator=generator)
        # The last expert has no tokens.
        self.expert_VK = scores[:, :-1].topk(choices).indices.to(device)
        self.layer, self.segments = layer.to(device, torch.bfloat16), layer.segments
        if layer.router is not None:  # its start would weigh all the same
            with torch.no_grad():
                layer.router.weight.copy_(torch.randn(layer.router.weight.shape, generator=generator))
        self.groups = ExpertParallel(EXPERTS * self.segments)
        self.inputs = [tensor.to(device) for tensor in self.draw(0)]
        self.inputs[1].requires_grad_()

    @staticmethod
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        token_T = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
        x, grad = torch.randn(2, TOKENS, 1, WIDTH, generator=generator).bfloat16()
        return token_T, x, grad

    def fill(self, seed):
        with torch.no_grad():
            for static, value in zip(self.inputs, self.draw(seed), strict=True):
                static.copy_(value)

    def run(self):
        token_T, x_LBD, grad_LBD = self.inputs
        expert_TK = self.expert_VK.index_select(0, token_T)
        if self.segments > 1:
            expert_TK = expert_TK * self.segments + torch.arange(self.segments, device=token_T.device)
        route = HashRoute(Assignment(expert_TK), make_dispatcher(self.groups).begin(expert_TK), self.segments)
        y_LBD, report = self.layer(x_LBD, RoutingContext(None, [route]))
        return [y_LBD, report, *torch.autograd.grad(y_LBD, [x_LBD, *self.layer.parameters()], grad_LBD)]


def relu(recompute=False, segments=1):
    return ExpertFeedForward(range(EXPERTS), WIDTH, HIDDEN, F.relu, 0.0, (0,), segments=segments, recompute=recompute)


def swiglu(recompute=False):
    return GatedFeedForward(range(EXPERTS), WIDTH, HIDDEN, 10.0, 0.0, (0,), recompute)


def sparse(experts, choices=1, router=None, segments=1, shared=None):
    dispatcher, form = LocalDispatcher(ExpertParallel(EXPERTS)), {"segments": segments, "top_k": choices}
    return SparseLayer(None, experts, dispatcher, hash_route=0, hash_weights=router, **form, shared=shared)


def shared_expert():
    return GatedFeedForward(range(1), WIDTH, HIDDEN, 0.0, 0.0, (1,))


LAYERS = {
    "relu": lambda: (sparse(relu()), 1),
    "recompute": lambda: (sparse(swiglu(recompute=True)), 1),
    "weights": lambda: (
        sparse(swiglu(), 2, HashWeights(WIDTH, EXPERTS, "sqrt-softplus", 1.5), shared=shared_expert()),
        2,
    ),
    "multi-hash": lambda: (sparse(relu(segments=2), segments=2), 2),
}


def assert_right(step, results, seed):
    """The report is of these tokens: not of those that the graph was captured with."""
    token_T, x_LBD, _ = step.draw(seed)
    assert results[1][0] == TOKENS
    tokens_per_expert_E = torch.bincount(step.expert_VK.cpu()[token_T].flatten(), minlength=EXPERTS)
    torch.testing.assert_close(RoutingReport(results[1]).tokens_per_expert_E.cpu(), tokens_per_expert_E.float())


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_a_replay_equals_an_eager_step(name, cuda, record_property):
    layer, choices = LAYERS[name]()
    step = Step(layer, choices, cuda)
    # As torch asks for: a few steps on another stream first. They also try the grouped product.
    stream = torch.cuda.Stream(cuda)
    stream.wait_stream(torch.cuda.current_stream(cuda))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream(cuda).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    for seed in (1, 2, 1):
        step.fill(seed)
        wanted = [value.clone() for value in step.run()]
        for value in captured:
            value.detach().fill_(float("nan"))
        graph.replay()
        assert_right(step, captured, seed)
        for got, want in zip(captured, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=2**-7 * want.abs().max().item())
        same_bits = all(map(torch.equal, captured, wanted))
        record_property(f"same bits, seed {seed}", same_bits)
        print(f"{name}, seed {seed}: {'the same bits' if same_bits else 'other bits'}")


@pytest.mark.gpu
def test_what_needs_sizes_on_the_host_says_so(cuda):
    """In fp32 the experts are a loop over sizes that the host knows, here at capture only."""
    size_G = torch.tensor([3, 0, 2], device=cuda)
    assert GPU_WAYS[torch.float32] != "grouped"
    assert GroupSizes(size_G).host == (3, 0, 2)
    message = ""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        sizes = GroupSizes(size_G)
        ends_G = sizes.ends(cuda)
        try:
            sizes.host  # noqa: B018
        except RuntimeError as error:
            message = str(error)
    assert ends_G.shape == (3,) and "a CUDA graph cannot hold" in message
