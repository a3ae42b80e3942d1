"""The rules of the biases against naive loops in float64, and against what other projects publish."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_hash.moe import expert_bias
from fairseq_hash.moe.expert_bias import BINS, quantile_bias, required_bias_histogram, sign_step


def naive_histogram(score_TE, bias_E, choices):
    """Token by token: the bias that each expert needs to be one of the K, and the bin of it."""
    low = min(bias_E) - 1
    width = (max(bias_E) + 1 - low) / BINS
    histogram = [[0] * BINS for _ in bias_E]
    for score_E in score_TE:
        biased = sorted((s + b for s, b in zip(score_E, bias_E, strict=True)), reverse=True)
        for e, score in enumerate(score_E):
            histogram[e][math.floor((biased[choices] - score - low) / width)] += 1
    return histogram


def naive_quantile(histogram, bias_E, choices):
    """Walk through the bins until K / E of the tokens are reached, and into the last one as far as needed."""
    width = (max(bias_E) - min(bias_E) + 2) / BINS
    positions = []
    for counts in histogram:
        wanted, n = sum(counts) * choices / len(bias_E), 0
        while wanted > counts[n]:
            wanted -= counts[n]
            n += 1
        positions.append((n + wanted / counts[n]) * width)
    mean = sum(positions) / len(positions)
    return [position - mean for position in positions]


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(2, 6), st.integers(0, 1000))
def test_histogram_and_quantile_equal_the_naive_loops(tokens, experts, seed):
    """Scores and biases are float64 here, so that no bin differs by rounding."""
    generator = torch.Generator().manual_seed(seed)
    score_TE = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    bias_E = torch.rand(experts, generator=generator, dtype=torch.float64) - 0.5
    choices = int(torch.randint(1, experts, (), generator=generator))
    cutoff_T = (score_TE + bias_E).topk(choices + 1).values[:, -1]
    histogram_EN = required_bias_histogram(score_TE, cutoff_T, bias_E)
    naive = naive_histogram(score_TE.tolist(), bias_E.tolist(), choices)
    assert histogram_EN.tolist() == naive
    quantile_E = quantile_bias(histogram_EN, bias_E, choices)
    expected_E = torch.tensor(naive_quantile(naive, bias_E.tolist(), choices), dtype=torch.float64)
    torch.testing.assert_close(quantile_E, expected_E, rtol=0, atol=1e-12)
    half = tokens // 2
    parts = [required_bias_histogram(score_TE[p], cutoff_T[p], bias_E) for p in (slice(half), slice(half, None))]
    assert torch.equal(sum(parts), histogram_EN)


def test_the_quantile_is_that_of_the_tokens_to_a_bin():
    """Against the exact quantile: the K x T / E-th smallest of the biases that the tokens require."""
    generator = torch.Generator().manual_seed(5)
    score_TE, bias_E = torch.rand(3000, 6, generator=generator), torch.rand(6, generator=generator) * 0.2
    cutoff_T = (score_TE + bias_E).topk(3).values[:, -1]
    found_E = quantile_bias(required_bias_histogram(score_TE, cutoff_T, bias_E), bias_E, 2)
    exact_E = (cutoff_T.unsqueeze(1) - score_TE).sort(dim=0).values[3000 * 2 // 6 - 1]
    # A bin is 0.0022 wide; the means differ by as much at most.
    assert (found_E - (exact_E - exact_E.mean())).abs().max() < 0.0044


def test_published_figures(monkeypatch):
    """Megatron-core's test of its quantile: two experts, four bins from -1 to 1, K = 1."""
    monkeypatch.setattr(expert_bias, "BINS", 4)
    histogram_EN = torch.tensor([[0, 2, 2, 0], [2, 2, 0, 0]])
    assert torch.equal(quantile_bias(histogram_EN, torch.zeros(2), 1), torch.tensor([0.25, -0.25]))


def test_without_a_token_the_bias_stays():
    bias_E = torch.tensor([0.3, -0.1, 0.2])
    nothing_EN = required_bias_histogram(torch.zeros(0, 3), torch.zeros(0), bias_E)
    assert not nothing_EN.any() and torch.equal(quantile_bias(nothing_EN, bias_E, 1), bias_E)
    assert torch.equal(sign_step(bias_E, torch.zeros(3), 0.1), bias_E)


def test_sign_step():
    """One step up, down, or none for an expert at the mean exactly."""
    stepped_E = sign_step(torch.tensor([0.5, 0.5, -0.5]), torch.tensor([1.0, 7.0, 4.0], dtype=torch.float64), 0.25)
    assert stepped_E.dtype == torch.float32 and stepped_E.tolist() == [0.75, 0.25, -0.5]
