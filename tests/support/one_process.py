"""`python -m data_prep` without its worker processes: to start one takes longer than what the tests give it to do."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

from data_prep import pieces


@contextmanager
def one_process():
    """Let this process do the work of `data_prep.pieces.workers`, for the time of a `with` block."""

    @contextmanager
    def workers(number, model, indices=None):
        pieces.load(model and str(model), indices)
        with ThreadPoolExecutor(1) as pool:
            yield pool

    try:
        with mock.patch.object(pieces, "workers", workers):
            yield
    finally:
        pieces.load(None)
