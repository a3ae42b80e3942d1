"""Ranks agree before they start: all go on, or all say the same."""

import pytest
import ranks

from fairseq_hash.core.errors import UserError
from fairseq_hash.parallel.collectives import check_same, run_on_all_ranks


def test_all_ranks_do_or_say_the_same():
    said = ranks.run(3, "agreement_ranks:agree")
    for rank, answers in enumerate(said):
        assert answers == [
            rank,
            "UserError: rank 1: give another",
            "UserError: rank 1: OSError: no disc",
            f"OSError: no disc of {rank}",
            None,
            "UserError: rank 2 has seed 5, rank 0 has 1; start every rank with the same options, data and table",
        ]


def test_one_process_agrees_with_itself():
    def fail():
        raise UserError("give another")

    assert run_on_all_ranks(lambda: 3) == 3
    with pytest.raises(UserError, match="^give another$"):
        run_on_all_ranks(fail)
    check_same({"width": 3})
