"""What the tests of `data_prep` share."""

import pytest
from one_process import one_process


@pytest.fixture
def in_one_process():
    """No worker processes, where a test is not about them."""
    with one_process():
        yield
