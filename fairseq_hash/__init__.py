"""A fairseq plugin for language models with sparse feed-forward layers (`--user-dir fairseq_hash`)."""

import logging
import warnings
from importlib.util import find_spec

# Tables and reports are made where fairseq is not installed, too; there is nothing to register with then.
if find_spec("fairseq") is not None:
    # What fairseq and fairscale say when they are first imported (deprecated calls, a missing speech library) would
    # stand above the output of every command of ours.
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from fairseq_hash import criterion, fused_adam, model, seams  # noqa: F401
    logging.disable(disabled)

    seams.require_supported_fairseq()
