"""No option does nothing without a word: each says when it acts, and is refused or named where it cannot."""

from dataclasses import fields, replace

import pytest
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY
from fairseq.optim.adam import FairseqAdamConfig
from plugin import build, train

from fairseq_hash.core.errors import UserError
from fairseq_hash.lm.criterion import HashMoECriterion
from fairseq_hash.options import option_use
from fairseq_hash.options.criterion_options import HashMoECriterionConfig
from fairseq_hash.options.sparse_options import SparseOptions

HASH = {"router": "hash", "sparse_layers": "1,3"}
SWITCH = {"router": "switch", "sparse_layers": "1,3"}
BASE = {"router": "base", "sparse_layers": "1,3"}
STABLE = {"router": "stablemoe", "sparse_layers": "1,3"}
MEMORY = HASH | {"memory_layers": "1"}
TOP_2 = HASH | {"experts_per_token": 2}
TOPK = {"router": "topk", "sparse_layers": "1,3"}
BIAS, QUANTILE = TOPK | {"balancing": "bias"}, TOPK | {"balancing": "quantile"}

# Of each option a value beside its default, a model in which it acts, and one with experts in which it does not (None
# where it acts in all of them).
EXAMPLES = {
    "num_experts": (8, BASE, None),
    "sparse_layers": ("0", HASH, None),
    "sparse_placement": ("insert", BASE, None),
    "expert_sublayers": (2, BASE | {"sparse_placement": "insert"}, BASE),
    "capacity_factor": (1.25, HASH, None),
    "eval_capacity_factor": (2.0, HASH, None),
    "router_jitter": (0.1, HASH | {"router": "hash,switch"}, BASE),
    "base_balance": ("local", BASE, SWITCH),
    "stable_updates": (9, STABLE, SWITCH),
    "stable_width": (9, STABLE, BASE),
    "second_expert_policy": ("all", HASH | {"router": "hash,gshard"}, SWITCH),
    "sinkhorn_balance": ("local", HASH | {"router": "sinkhorn"}, BASE),
    "sinkhorn_iterations": (5, HASH | {"router": "sinkhorn"}, BASE),
    "sinkhorn_tolerance": (0.0, HASH | {"router": "sinkhorn"}, BASE),
    "expert_dropout": (0.1, HASH, None),
    "recompute_hidden": (True, HASH, None),
    "expert_form": ("swiglu", HASH, None),
    "swiglu_limit": (10.0, HASH | {"expert_form": "swiglu"}, HASH),
    "shared_expert": (True, HASH, None),
    "expert_parallel_size": (1, HASH, None),
    "expert_dispatch": ("fairscale", HASH, None),
    "expert_placement": ("balanced", HASH, None),
    "expert_replicas": (4, HASH, None),
    "from_dense": ("dense.pt", HASH, None),
    "freeze": ("experts", HASH, None),
    "hash_table": ("random", HASH, SWITCH),
    "hash_seed": (7, HASH | {"hash_table": "balanced,scattered"}, HASH),
    "hash_per_layer": (True, HASH, HASH | {"sparse_layers": "1"}),
    "hash_feature": ("previous", HASH, SWITCH),
    "hash_length": (2, HASH | {"hash_feature": "ngram", "hash_table": "random"}, SWITCH),
    "hash_buckets": (99, HASH | {"hash_feature": "bigram", "hash_table": "random"}, HASH | {"hash_table": "random"}),
    "hash_predictor": ("model.pt", HASH | {"hash_feature": "predicted"}, SWITCH),
    "multi_hash": (2, HASH, SWITCH),
    "experts_per_token": (2, HASH | {"router": "switch,hash"}, BASE),
    "hash_weights": ("learned", TOP_2, HASH),
    "hash_score": ("sigmoid", TOP_2 | {"hash_weights": "learned"}, TOP_2),
    "hash_scale": (2.5, HASH, SWITCH),
    "hash_count_eos": (True, HASH | {"hash_table": "random,scattered"}, HASH | {"hash_table": "random"}),
    "gate": ("one", HASH | {"router": "hash,switch"}, HASH),
    "base_evaluation": ("balanced", BASE, SWITCH),
    "drop_priority": ("random", HASH | {"capacity_factor": 1.0}, HASH | {"eval_capacity_factor": 1.0}),
    "expert_layer_norm": (True, HASH, None),
    "balancing": ("bias", TOPK, SWITCH),
    "router_score": ("sigmoid", TOPK, SWITCH),
    "normalize_weights": (True, TOPK | {"router": "hash,topk", "experts_per_token": 2}, TOPK),
    "router_scale": (2.5, TOPK, HASH),
    "bias_step": (0.01, BIAS, QUANTILE),
    "quantile_smoothing": (0.9, QUANTILE, BIAS),
    "sequence_loss": (True, BIAS, BASE),
    "memory_orders": ("1,2", MEMORY, HASH),
    "memory_heads": (4, MEMORY, HASH),
    "memory_rows": (99, MEMORY, MEMORY | {"memory_orders": "1"}),
    "memory_width": (64, MEMORY, BASE),
    "memory_seed": (7, MEMORY, MEMORY | {"memory_orders": "1"}),
}
OF_CRITERION = {
    "load_balance_weight": (0.1, SWITCH, HASH),
    "z_loss_weight": (0.001, SWITCH, BASE),
    "distill_weight": (0.1, STABLE, SWITCH),
    "log_expert_loads": (True, HASH, None),
    "monitor_interval": (100, HASH, None),
    "monitor_patience": (3, HASH, None),
    "monitor_overload": (2.5, SWITCH, None),
    "sequence_loss_weight": (0.01, BIAS | {"sequence_loss": True}, BIAS),
}
ALWAYS = {"router", "memory_layers", "map_experts", "update_freq_ranks"}  # map_experts is refused in training


def test_every_option_has_a_statement():
    """A new option without one fails here, and one without an example below."""
    of_model = {f.name for f in fields(SparseOptions)} - {"_name"}
    of_criterion = {f.name for f in fields(HashMoECriterionConfig)}
    of_criterion -= {f.name for f in fields(CrossEntropyCriterionConfig)}
    assert set(option_use.MODEL) == of_model and set(option_use.CRITERION) == of_criterion
    assert {*EXAMPLES, *OF_CRITERION} | ALWAYS == of_model | of_criterion
    assert OPTIMIZER_DATACLASS_REGISTRY["fused_adam"] is FairseqAdamConfig  # the optimizer has no options of ours


def judge(name, value, model):
    """What is said of an option's value beside others: of the criterion's or of the model's."""
    if name in OF_CRITERION:
        return option_use.check_criterion(HashMoECriterion, {"_name": "hash_moe", name: value}, SparseOptions(**model))
    return option_use.check_model(replace(SparseOptions(**model), **{name: value}))


@pytest.mark.parametrize("name", [*EXAMPLES, *OF_CRITERION])
def test_where_an_option_acts_and_where_not(name):
    """It passes where it acts. Elsewhere it is refused in one line, but for a model that is dense by name: named."""
    value, acts, does_not = {**EXAMPLES, **OF_CRITERION}[name]
    assert judge(name, value, acts) == []
    option = f"--{name.replace('_', '-')}"
    dense = [{}] if does_not is None else [{}, does_not]
    for model in dense:
        with pytest.raises(UserError) as refused:
            judge(name, value, model)
        line = str(refused.value)
        assert line.startswith(f"{option}{'' if value is True else f' {value}'} needs ") and "\n" not in line
        assert "--router none for a dense model" in line if not model else f"with --router {model['router']};" in line
    by_name = {"router": "none"}
    if name in ("freeze", "from_dense"):
        with pytest.raises(UserError, match=f"{option} {value} needs experts"):
            judge(name, value, by_name)
    else:
        assert judge(name, value, by_name) == [f"{option}{'' if value is True else f' {value}'}"]


def test_the_defaults_ask_for_nothing():
    """Whatever the router: what is not given cannot be in vain."""
    for model in ({}, {"router": "none"}, HASH, SWITCH, BASE, TOPK, BIAS, QUANTILE):
        assert option_use.check_model(SparseOptions(**model)) == []
        assert option_use.check_criterion(HashMoECriterion, {"_name": "hash_moe"}, SparseOptions(**model)) == []
    no_loss = {"_name": "hash_moe", "load_balance_weight": 0.0}
    assert option_use.check_criterion(HashMoECriterion, no_loss, SparseOptions(**HASH)) == []


def test_the_weight_of_the_balance_loss_needs_a_router_that_has_it():
    weight = {"_name": "hash_moe", "load_balance_weight": 0.1}
    for model in (TOPK, BIAS | {"router": "switch,topk"}):
        assert option_use.check_criterion(HashMoECriterion, weight, SparseOptions(**model)) == []
    with pytest.raises(UserError, match="--load-balance-weight 0.1 needs a layer with a load-balancing loss"):
        option_use.check_criterion(HashMoECriterion, weight, SparseOptions(**BIAS))


def test_a_router_gets_the_criterion_that_it_needs():
    """Another one has neither a switch router's loss nor the name of an oracle's perplexity."""
    other = (CrossEntropyCriterion, {"_name": "cross_entropy"})
    for model in ({}, {"router": "none"}, HASH, BASE):
        assert option_use.check_criterion(*other, SparseOptions(**model)) == []
    for model in (SWITCH, SWITCH | {"router": "hash,switch"}):
        with pytest.raises(UserError, match="--criterion cross_entropy leaves out the load-balancing loss of --router"):
            option_use.check_criterion(*other, SparseOptions(**model))
    with pytest.raises(UserError, match="of --hash-feature future, an oracle, a language model's; use --criterion"):
        option_use.check_criterion(*other, SparseOptions(**HASH, hash_feature="future"))
    with pytest.raises(UserError, match="of --base-evaluation balanced, an oracle, a language model's; use"):
        option_use.check_criterion(*other, SparseOptions(**BASE, base_evaluation="balanced"))


def test_a_checkpoint_of_before_loads_in_evaluation(data, caplog):
    """What it was trained with, in vain or not, is no error when it is evaluated."""
    given = ("--router", "switch", "--sparse-layers", "1", "--hash-table", "random", "--hash-buckets", "9")
    with pytest.raises(SystemExit, match="--hash-table random needs a hash layer"):
        build(data, *given)
    build(data, *given, for_evaluation=True)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_trainings_end_before_they_start_or_say_it(data, tmp_path):
    """By the command: a forgotten router, another criterion, and a dense model by name."""
    cases = {
        "": "--sparse-layers 1 needs experts (a --router other than none), and no --router is",
        "--router switch --criterion cross_entropy": "--criterion cross_entropy leaves out the load-balancing loss of "
        "--router switch; use --criterion hash_moe",
        "--router hash --z-loss-weight 0.1": "--z-loss-weight 0.1 needs a switch or topk layer (--router switch or "
        "topk), and does nothing here, with --router hash",
    }
    for options, line in cases.items():
        done = train(data, tmp_path / "refused", "--sparse-layers", "1", *options.split(), check=False)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith(f"fairseq_hash: {line}") and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("refused/*"))
    done = train(data, tmp_path / "dense", "--router", "none", "--sparse-layers", "1", "--max-update", "1")
    said = "| WARNING | fairseq_hash.model | a dense model has no use for --sparse-layers 1"
    assert said in done.stdout + done.stderr
