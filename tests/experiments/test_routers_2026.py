"""`configs/routers_2026` and `configs/first_k`: models of equal parameters and work, as their head says."""

import functools
from pathlib import Path

import pytest
from hydra_configs import needs_current_hydra

from fairseq_hash.experiments.compose import compose
from fairseq_hash.experiments.names import experiment_names
from fairseq_hash.experiments.sizes import sizes

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = needs_current_hydra
NAMES = [name for name in experiment_names(CONFIGS) if name.startswith(("routers_2026/", "first_k/"))]
SPARSE = [name for name in NAMES if name != "routers_2026/dense"]
SCALES = ["laptop", pytest.param("one_gpu", marks=pytest.mark.slow)]


@functools.cache
def sizes_of(name, scale):
    experiment = compose(CONFIGS, name, [f"scale={scale}"])
    return experiment.config.model, sizes(experiment)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SPARSE)
def test_the_work_is_that_of_the_dense_model_and_of_the_router(name, scale):
    """A router's own product is E x D multiply-adds a layer, and StableMoE's light router is its width x E more."""
    _, dense = sizes_of("routers_2026/dense", scale)
    model, of = sizes_of(name, scale)
    layers = len(model.sparse_layers.split(","))
    routers = model.router.split(",") if "," in model.router else [model.router] * layers
    products = sum(model.num_experts * model.decoder_embed_dim for router in routers if router not in ("hash", "none"))
    products += routers.count("stablemoe") * model.num_experts * model.stable_width
    assert of.flops_per_token - 2 * products == pytest.approx(dense.flops_per_token, rel=2e-4)
    assert (of.tokens_per_update, of.updates) == (dense.tokens_per_update, dense.updates)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SPARSE)
def test_parameters_are_those_of_hash(name, scale):
    """Within 2 %, but for the embedding of StableMoE's light router; of the active ones a router has E x D a layer."""
    _, rival = sizes_of("routers_2026/hash", scale)
    model, of = sizes_of(name, scale)
    light = len(model.sparse_layers.split(",")) * model.stable_width if model.router == "stablemoe" else 0
    vocabulary = 404 if scale == "laptop" else 8004
    assert of.total - light * vocabulary == pytest.approx(rival.total, rel=0.02)
    assert of.active - light * vocabulary == pytest.approx(rival.active, rel=0.02)
