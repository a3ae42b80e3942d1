"""Checkpoints that several files of tests look into, and leave as they are."""

import pytest
from saved_checkpoints import merge_two, save_two


@pytest.fixture(scope="session")
def saved(data, tmp_path_factory):
    """A folder with `two.pt` and `four.pt`, in shards."""
    return save_two(data, tmp_path_factory.mktemp("saved [by] ranks"))


@pytest.fixture(scope="session")
def merged(saved, tmp_path_factory):
    """A folder with the two as plain files."""
    return merge_two(saved, tmp_path_factory.mktemp("merged"))
