"""What `plan` says of memory and of who holds which experts is what a run has, for every number of ranks."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import optim
from hydra_configs import needs_current_hydra

from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.compose import compose
from fairseq_hash.experiments.memory import describe, place_of, precision_of, state_bytes
from fairseq_hash.experiments.sizes import made_task, sizes
from fairseq_hash.lm import model as hash_model
from fairseq_hash.parallel import groups
from fairseq_hash.parallel.groups import ExpertParallel, expert_parallel

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["experiment.vocabulary=90", "task.tokens_per_sample=16", "model.decoder_embed_dim=32"]
SMALL += ["model.decoder_ffn_embed_dim=64"]
pytestmark = needs_current_hydra


@pytest.fixture
def as_rank(monkeypatch):
    """Let the package believe that it is one rank of a world: process groups are made of nothing."""

    def become(rank, world_size):
        known = {"is_initialized": lambda: True, "get_rank": lambda: rank, "get_world_size": lambda: world_size}
        monkeypatch.setattr(groups, "dist", SimpleNamespace(new_group=lambda ranks: tuple(ranks), **known))
        monkeypatch.setattr(hash_model, "watchdog_of", lambda *_: None)

    return become


def test_the_place_is_that_of_the_run(as_rank):
    """For every world up to 24 ranks, many numbers of experts, and every size that is given: also which are refused."""
    shared = 0
    for world_size in range(1, 25):
        for experts in (1, 2, 3, 4, 6, 8, 12, 16, 21, 64):
            for size in range(0, world_size + 2):
                config = SimpleNamespace(model={"router": "hash", "num_experts": experts, "expert_parallel_size": size})
                as_rank(0, world_size)
                try:
                    run = expert_parallel(experts, size)
                except UserError as error:
                    with pytest.raises(UserError) as planned:
                        place_of(config, world_size)
                    assert str(planned.value) == str(error)
                    continue
                place = place_of(config, world_size)
                assert place.describe() == run.describe()
                for what in ("size", "expert_ids", "saved_experts"):
                    assert getattr(place, what) == getattr(run, what)
                assert (run.replicas is None) == (run.size in (1, world_size))
                shared += run.size > 1
    assert shared > 200
    as_rank(0, 3)
    fairscale = SimpleNamespace(model={"router": "hash", "num_experts": 16, "expert_dispatch": "fairscale"})
    with pytest.raises(UserError, match="here each of 3 holds all"):
        place_of(fairscale, 3)
    assert place_of(fairscale, 4).is_shared


def test_three_ranks_hold_all_of_sixteen_experts():
    """Nothing divides both: no rank has fewer, whatever the number of ranks."""
    experiment = compose(CONFIGS, "laptop/hash")
    of = sizes(experiment, 3)
    assert "every rank of 3 holds all 16 experts" in describe(of, experiment.config, 3)
    assert state_bytes(of, experiment.config, place_of(experiment.config, 3)) == 16 * of.total + of.buffer_bytes
    assert "4 ranks share 16 experts: rank 0: 0 to 3" in describe(of, experiment.config, 4)
    dense = compose(CONFIGS, "laptop/dense")
    assert "expert" not in describe(sizes(dense), dense.config, 3)


def held_bytes(config, vocabulary):
    """What the run has after an update: of every tensor of the model, its gradients and its optimizer, each once."""
    model = hash_model.HashTransformerLanguageModel.build_model(config.model, made_task(config, vocabulary))
    if config.common.bf16:
        model.bfloat16()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wraps = optim.FP16Optimizer if config.common.bf16 else None
    if config.common.memory_efficient_bf16:
        wraps = optim.MemoryEfficientFP16Optimizer
    optimizer = wraps.build_optimizer(config, trained) if wraps else optim.build_optimizer(config.optimizer, trained)
    optimizer.backward(sum(parameter.float().sum() for parameter in trained))
    optimizer.clip_grad_norm(1.0)
    optimizer.step()
    tensors = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in trained)]
    for parameter in getattr(optimizer, "fp32_params", ()):
        tensors += [parameter, parameter.grad]
    inner = getattr(optimizer, "fp32_optimizer", getattr(optimizer, "wrapped_optimizer", optimizer))
    for state in inner.optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value) and value.dim()]
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}.values())


GATED = ("expert_form=swiglu", "shared_expert=true", "experts_per_token=2")
CASES = {
    "hash": ("laptop/hash", []),
    "hash, one set of experts a rank": ("laptop/hash", ["+model.expert_parallel_size=1"]),
    "switch, in groups": ("laptop/switch", ["+model.expert_parallel_size=2"]),
    "replicas, placed by a file": (
        "laptop/hash",
        ["+model.expert_placement='{loads}'", "+model.expert_replicas=4", "common.bf16=true"],
    ),
    "by fairscale": ("laptop/switch", ["+model.expert_dispatch=fairscale"]),
    "inserted BASE": ("laptop/base", ["+model.sparse_placement=insert", "+model.expert_sublayers=3"]),
    "gated, shared, several experts": ("laptop/hash", [f"+model.{option}" for option in GATED]),
    "frozen experts": ("laptop/hash", ["+model.freeze=experts"]),
    "frozen but experts": ("laptop/base", ["+model.freeze=all-but-experts"]),
    "bf16": ("laptop/hash", ["common.bf16=true"]),
    "bf16, frozen experts": ("laptop/hash", ["common.bf16=true", "+model.freeze=experts"]),
    "bf16, fused": ("laptop/hash", ["common.bf16=true", "optimizer._name=fused_adam"]),
    "memory-efficient bf16": ("laptop/hash", ["common.bf16=true", "common.memory_efficient_bf16=true"]),
    "fused": ("laptop/hash", ["optimizer._name=fused_adam"]),
    "dense": ("laptop/dense", []),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_a_run_holds(name, as_rank, tmp_path):
    """To the byte, on a rank of 1, 2, 4 and 6 (where fairscale has ranks to exchange with).

    In half precision two marks of fairseq's, buffers of one number, have two bytes less.
    """
    loads = tmp_path / "loads.csv"
    loads.write_text("layer,expert,load\n" + "".join(f"1,{expert},{1 + expert}\n" for expert in range(16)))
    overrides = [override.format(loads=loads) for override in CASES[name][1]]
    experiment = compose(CONFIGS, CASES[name][0], [*SMALL, *overrides])
    config = experiment.config
    for world_size in (1, 2, 4, 6):
        if world_size == 1 and ("fairscale" in name or "in groups" in name or "replicas" in name):
            continue
        of = sizes(experiment, world_size)
        as_rank(world_size - 1, world_size)
        held = held_bytes(config, experiment.about["vocabulary"])
        as_rank(0, 1)
        marks = 4 if config.common.bf16 else 0
        assert state_bytes(of, config, place_of(config, world_size)) == held + marks, world_size


@pytest.mark.parametrize(
    ("overrides", "precision", "bytes_of_one"),
    [
        ([], "fp32", 16),
        (["common.amp=true"], "amp", 16),
        (["common.fp16=true"], "fp16", 20),
        (["common.fp16=true", "common.memory_efficient_fp16=true"], "memory-efficient fp16", 12),
        (["common.fp16=true", "optimizer.fp16_adam_stats=true"], "fp16", 16),
        (["common.bf16=true", "distributed_training.ddp_backend=fully_sharded"], "bf16", 20),
        (["common.fp16=true", "distributed_training.ddp_backend=fully_sharded"], "fp16", 16),
    ],
)
def test_bytes_of_a_parameter(overrides, precision, bytes_of_one):
    """Of what cannot run on a CPU, by hand; fully sharded data parallel shares out what is not of the experts."""
    experiment = compose(CONFIGS, "laptop/hash", [*SMALL, *overrides])
    of, config = sizes(experiment), experiment.config
    assert precision_of(config) == precision
    holders = 4 if config.distributed_training.ddp_backend == "fully_sharded" else 1
    values = (of.total - of.expert_parameters) / holders + of.expert_parameters / 4
    found = state_bytes(of, config, ExpertParallel(16, 4, 0, 4)) - of.buffer_bytes
    assert found == round(bytes_of_one * values)


def test_a_batch_grows_with_the_ranks_unless_it_is_meant_for_some():
    """What --update-freq-ranks is for."""
    fixed = compose(CONFIGS, "laptop/hash")
    assert [sizes(fixed, ranks).tokens_per_update for ranks in (1, 3)] == [1024, 1024]
    grows = compose(CONFIGS, "laptop/hash", ["criterion.update_freq_ranks=0"])
    assert [sizes(grows, ranks).tokens_per_update for ranks in (1, 3)] == [1024, 3 * 1024]
