"""A fairseq plugin for language models with sparse feed-forward layers (`--user-dir fairseq_hash`)."""

from importlib.util import find_spec

# Tables and reports are made where fairseq is not installed, too; there is nothing to register with then.
if find_spec("fairseq") is not None:
    from fairseq_hash import criterion, model, seams  # noqa: F401

    seams.require_supported_fairseq()
