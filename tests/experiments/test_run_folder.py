"""Names of run folders: a shell takes them as they are, and two runs never share one."""

import re
import shlex
from pathlib import Path

import pytest
from hydra_configs import needs_current_hydra
from hypothesis import given
from hypothesis import strategies as st

from fairseq_hash.experiments.compose import compose
from fairseq_hash.experiments.run_folder import folder_name

pytestmark = needs_current_hydra
CONFIGS = Path(__file__).parents[2] / "configs"
GIVEN = st.lists(st.one_of(st.sampled_from("[]'\" =,*?${}()~#&;|<>!\\`:/"), st.text(max_size=9)), max_size=60)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("", ""),
        ("model.num_experts=32,optimization.lr=[0.002]", "model.num_experts=32,optimization.lr=0.002"),
        ("optimization.lr=[0.1,0.2]", "optimization.lr=0.1,0.2"),
        ("model.sparse_layers='1,3'", "model.sparse_layers=1,3"),
        ("+model.hash_table=tables/a.safetensors", "+model.hash_table=tables/a.safetensors"),
    ],
)
def test_names_tell_what_was_given(overrides, name):
    assert folder_name(overrides) == name


@given(GIVEN.map("".join), GIVEN.map("".join))
def test_no_name_needs_quotes_and_none_is_that_of_another_run(one, other):
    for overrides in (one, other):
        name = folder_name(overrides)
        assert not name or shlex.quote(name) == name
        assert len(name) < 220 and folder_name(overrides) == name
    if re.sub(r"[][\"']", "", one) != re.sub(r"[][\"']", "", other):
        assert folder_name(one) != folder_name(other)


def test_experiments_have_such_folders():
    """Where the package is and where the data is do not name a run."""
    given = ["optimization.update_freq=[4]", "common.seed=3", "task.data=/a b", "common.user_dir=/some/where"]
    assert str(compose(CONFIGS, "laptop/hash", given).folder) == "runs/laptop/hash/optimization.update_freq=4/seed3"
    assert compose(CONFIGS, "laptop/hash").folder == Path("runs/laptop/hash/seed1")
