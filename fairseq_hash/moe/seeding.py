"""Random numbers of one part of a model, which depend on no other part."""

import hashlib

import torch


def seeded_generator(*key: "int | str") -> torch.Generator:
    """Return a CPU generator for one part of the model, seeded by torch's initial seed and the part's `key`.

    Weights drawn from it depend neither on what was drawn before nor on how experts are shared out, and drawing them
    leaves torch's own random state alone: the dense parameters of a sparse model start where a dense model's start.
    """
    digest = hashlib.sha256(repr((torch.initial_seed(), *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
