"""Hash layers on a device against the naive reference: output, report and all gradients, in every dtype."""

import pytest

from gpu.layers import DTYPES, Case, check

CASES = {
    "one expert": Case(),
    "no padding": Case(padded=False, used=(0, 1, 2, 3)),
    "first without tokens": Case(used=(1, 2, 3)),
    "last without tokens": Case(used=(0, 1, 2)),
    "all on one": Case(used=(2,)),
    "all on the last of eight": Case(experts=8, used=(7,)),
    "a single expert": Case(experts=1, used=(0,)),
    "capacity": Case(capacity=0.75),
    "shared": Case(shared=True),
    "two, uniform": Case(choices=2),
    "two, uniform, with capacity": Case(choices=2, capacity=1.0),
    "two, softmax": Case(choices=2, score="softmax"),
    "two, sigmoid": Case(choices=2, score="sigmoid"),
    "two, sqrt-softplus": Case(choices=2, score="sqrt-softplus"),
    "three of eight, learned": Case(choices=3, score="sigmoid", experts=8, used=(0, 1, 3, 4, 6), shared=True),
    "MultiHash of 2": Case(segments=2),
    "MultiHash of 4": Case(segments=4, used=(0, 1, 2, 3), hidden=64),
    "MultiHash, shared": Case(segments=2, shared=True, form="relu"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_hash_layer_equals_the_naive_loop(case, dtype, device):
    check(CASES[case], DTYPES[dtype], device)
