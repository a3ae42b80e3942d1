"""Large tensors on the CPU: like any other, in huge pages, with the memory of those that are gone."""

import random

import pytest
import torch
import torch.nn.functional as F

from fairseq_hash.moe.experts import ExpertFeedForward
from fairseq_hash.moe.kernels import huge_pages


@pytest.mark.parametrize("make", [huge_pages.empty_in_huge_pages, huge_pages.empty_again])
@pytest.mark.parametrize("rows", [0, 1, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_like_any(rows, dtype, make):
    like = torch.zeros(1, dtype=dtype)
    tensor = make((rows, 1024), like)
    assert tensor.shape == (rows, 1024) and tensor.dtype == dtype and tensor.is_contiguous()
    tensor.fill_(3)
    assert tensor.double().sum() == 3 * tensor.numel()


@pytest.mark.skipif(huge_pages.ADVICE is None, reason="no huge pages on this system")
def test_a_gradient_has_the_memory_of_one_that_is_gone():
    parameter = torch.nn.Parameter(torch.zeros(2049, 1024))
    first, second = (huge_pages.empty_again(parameter.shape, parameter).fill_(value) for value in (1, 2))
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    kept = first[3].detach()  # any tensor that uses the memory keeps it
    del first
    third = huge_pages.empty_again(parameter.shape, parameter).fill_(3)
    assert third.data_ptr() not in places
    del second
    fourth = huge_pages.empty_again(parameter.shape, parameter).fill_(4)
    assert fourth.data_ptr() in places
    assert (kept == 1).all() and (third == 3).all() and (fourth == 4).all()


@pytest.mark.skipif(huge_pages.ADVICE is None, reason="no huge pages on this system")
def test_gradients_of_successive_updates():
    """Autograd takes the tensor as it is, without a copy, and `zero_grad` sets its memory free."""
    experts = ExpertFeedForward(range(4), 512, 1024, F.relu, 0.0, (0,))
    rows, places = torch.randn(8, 512), []
    for _ in range(3):
        experts(rows, (2, 2, 0, 4)).sum().backward()
        places += [weight.grad.data_ptr() for weight in (experts.fc1_weight, experts.fc2_weight)]
        assert not experts.fc1_weight.grad[2].any()
        hidden = torch.relu(F.linear(rows[:2], experts.fc1_weight[0], experts.fc1_bias[0]))
        expected = hidden.sum(0).expand(512, -1)  # of the sum over what comes out
        torch.testing.assert_close(experts.fc2_weight.grad[0], expected, rtol=1e-5, atol=1e-5)
        experts.zero_grad()
    assert len(set(places)) == 2
    before = experts(rows, (2, 2, 0, 4)).sum().backward() or experts.fc1_weight.grad.clone()
    experts(rows, (2, 2, 0, 4)).sum().backward()  # added to what is there, as with `--update-freq`
    torch.testing.assert_close(experts.fc1_weight.grad, 2 * before)


@pytest.mark.skipif(huge_pages.ADVICE is None, reason="no huge pages on this system")
def test_no_more_memory_is_kept_than_lived_at_one_time():
    huge_pages.release()
    generator, alive, most = random.Random(0), [], 0
    for _ in range(300):
        if alive and generator.random() < 0.5:
            alive.pop(generator.randrange(len(alive)))
        else:
            rows = generator.choice([2048, 3000, 5000, 9000])
            alive.append(huge_pages.empty_again((rows, 1024), torch.empty(0)))
        lives = sum(tensor.nbytes for tensor in alive)
        most = max(most, lives)
        kept = sum(length * len(memories) for length, memories in huge_pages._free.items())
        assert lives + kept <= most
    assert kept
    huge_pages.release()
    assert not huge_pages._free


def test_other_devices_and_kinds_of_tensors():
    assert huge_pages.empty_in_huge_pages((5000, 1024), torch.empty(0, device="meta")).is_meta


def test_a_system_without_them(monkeypatch):
    monkeypatch.setattr(huge_pages, "ADVICE", None)
    assert huge_pages.empty_in_huge_pages((5000, 1024)).shape == (5000, 1024)
