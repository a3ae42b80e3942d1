"""Every place where fairseq's own behaviour is changed, and why. Everything else uses fairseq's public hooks.

Importing a module of this folder changes nothing: it records its overrides. `registry.apply` puts them in place, which
`fairseq_hash.register()` calls. `fairseq-hash patches` lists them.
"""

# The modules with overrides, in the order in which they are applied. Of two overrides of one function the later one is
# the outer one: it is called first, and gets the earlier one as its original.
ORDER = (
    "averaging",
    "checkpoints",
    "configuration",
    "cpu",
    "data_parallel",
    "lengths",
    "eval_lm",
    "failures",
    "generation",
    "half_precision",
    "model_building",
    "model_overrides",
    "objective",
    "places",
    "sharded",
    "start",
    "signals",
    "sweeps",
    "tensorboard",
    "trainer",
)
