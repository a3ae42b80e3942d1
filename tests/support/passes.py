"""A model's passes over random tokens, and what they must agree in: step by step, and beside padding."""

import torch

from fairseq_hash.moe.routers import statistics_of
from fairseq_hash.moe.routing_stats import RoutingReport

# Matrix products of other shapes sum in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tokens_of(task, rows=3, length=12, seed=0):
    """Return random token ids `[B, L]`, among them no padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, len(task.source_dictionary), (rows, length), generator=generator)


def sample_of(task, rows=3, seed=0, length=12):
    """Return a batch of such tokens as the criterion takes it."""
    token_BL = tokens_of(task, rows, length, seed)
    net_input = {"src_tokens": token_BL, "src_lengths": torch.full((rows,), length)}
    return {"net_input": net_input, "target": token_BL.roll(-1, 1), "ntokens": rows * length}


def assert_steps_give_the_full_pass(model, token_BL):
    """Decode one position at a time, and compare the logits."""
    full, _ = model(token_BL)
    state = {}
    steps = [model.decoder(token_BL[:, : n + 1], incremental_state=state)[0] for n in range(token_BL.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, **CLOSE)


def assert_padding_is_not_routed(model, task):
    """Behind a sequence, and before it: logits and reports are those of the sequences alone."""
    token_BL = tokens_of(task)
    (one, extra_one), (other, extra_other) = model(token_BL[:1, :5]), model(token_BL[1:2])
    for place in (slice(0, 5), slice(7, 12)):
        both = torch.cat([torch.full((1, 12), task.source_dictionary.pad()), token_BL[1:2]])
        both[0, place] = token_BL[0, :5]
        logits, extra = model(both)
        torch.testing.assert_close(logits[0, place], one[0], **CLOSE)
        torch.testing.assert_close(logits[1], other[0], **CLOSE)
        for key, sums in extra["routing"].items():
            vectors = (sums, extra_one["routing"][key], extra_other["routing"][key])
            together, *parts = (RoutingReport(vector, statistics_of(key[1])) for vector in vectors)
            assert together.tokens == 5 + 12
            assert torch.equal(together.tokens_per_expert_E, sum(part.tokens_per_expert_E for part in parts))
