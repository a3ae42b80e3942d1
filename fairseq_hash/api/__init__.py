"""Trained models in Python, without training: `fairseq_hash.load` returns a `LanguageModel`."""

from fairseq_hash import register

register()  # before anything below imports fairseq, to suppress its messages

from fairseq_hash.api.language_model import LanguageModel  # noqa: E402
from fairseq_hash.api.loading import load  # noqa: E402
from fairseq_hash.api.sampling import Sample  # noqa: E402

__all__ = ["LanguageModel", "Sample", "load"]
