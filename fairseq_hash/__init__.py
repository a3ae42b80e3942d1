"""A fairseq plugin for language models with sparse feed-forward layers (`--user-dir fairseq_hash`).

Importing it costs nothing: torch and fairseq are imported when something needs them. fairseq's commands register the
model and its companions by `--user-dir`, this package's own commands and `load` do it themselves, and everything else
by `import fairseq` before `import fairseq_hash`, or by `fairseq_hash.register()`.
"""

import sys
from importlib import import_module
from typing import Any

# Public names that are imported when they are first asked for: name -> module (PEP 562).
LAZY = {"load": "fairseq_hash.api", "__version__": "fairseq_hash.provenance"}


def register() -> None:
    """Import fairseq, register the model, the criterion and the optimizer with it, and apply `fairseq_patches`.

    A second call does nothing.

    Raises:
        ModuleNotFoundError: if fairseq is not installed.
        SystemExit: with one line, for a fairseq that the plugin was not written against, or that lacks a function.
    """
    import warnings

    from fairseq_hash.core.quiet import only_warnings

    # What fairseq and fairscale say when they are first imported (deprecated calls, a missing speech library) would
    # stand above the output of every command of ours.
    with only_warnings("fairseq", "fairscale"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import_module("fairseq_hash.fairseq_patches.upstream").require_supported_fairseq()
        for name in ("lm.criterion", "lm.model", "training.fused_adam"):
            import_module(f"fairseq_hash.{name}")
        registry = import_module("fairseq_hash.fairseq_patches.registry")
        registry.overrides()
    registry.apply()


def __getattr__(name: str) -> Any:
    """Return a public name that is not imported yet."""
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# `--user-dir` only imports this package, from inside of fairseq.
if sys.modules.get("fairseq") is not None:
    register()
