"""The memory of one rank of a training, computed as in the run.

Its share of the experts, and the states that fairseq keeps. Activations, the buffers of data parallelism and the memory
of libraries come on top.
"""

from omegaconf import DictConfig

from fairseq_hash.experiments.sizes import Sizes
from fairseq_hash.lm.placement import check_placement
from fairseq_hash.moe.dispatchers import check_dispatcher
from fairseq_hash.options.sparse_options import SparseOptions
from fairseq_hash.parallel.groups import ExpertParallel, planned
from fairseq_hash.parallel.placement import CONTIGUOUS

# Bytes of a weight, and of the fp32 copies of the weight and its gradient, by precision. A gradient has its weight's
# dtype.
KEPT = {"fp32": (4, 0), "amp": (4, 0), "fp16": (2, 8), "bf16": (2, 8)}
KEPT |= {"memory-efficient fp16": (2, 0), "memory-efficient bf16": (2, 0)}
# Number of values that an optimizer keeps per parameter, besides the parameter.
STATES = {"adam": 2, "fused_adam": 2, "adamax": 2, "adadelta": 2, "adagrad": 1, "nag": 1}


def place_of(config: DictConfig, ranks: int) -> ExpertParallel:
    """Return how ranks share the experts, as the run chooses it, before a placement by loads.

    A dense model counts as one expert on every rank.

    Raises:
        UserError: if this number of ranks cannot share the experts as the options say.
    """
    options = SparseOptions.from_config(config.model)
    if not options.is_sparse:
        return ExpertParallel(1, world_size=ranks)
    place = planned(options.num_experts, options.expert_parallel_size, 0, ranks)
    check_dispatcher(place, options.expert_dispatch)
    check_placement(place, options.expert_placement, options.expert_replicas)
    return place


def precision_of(config: DictConfig) -> str:
    """Return the precision of a training: fp32, amp, fp16 or bf16, memory-efficient or not."""
    common = config.common
    for form in ("fp16", "bf16"):
        if common[f"memory_efficient_{form}"]:
            return f"memory-efficient {form}"
        if common[form]:
            return form
    return "amp" if common.amp else "fp32"


def state_bytes(of: Sizes, config: DictConfig, place: ExpertParallel) -> int:
    """Return the bytes of weights, gradients, optimizer state and buffers on one rank.

    In half precision fairseq also keeps weights and gradients in fp32, unless it is memory-efficient. Frozen weights
    have neither gradient nor state. Fully sharded data parallel divides everything except the experts among the ranks.
    It keeps weights in fp32, and has half-precision weights only for a moment.
    """
    precision = precision_of(config)
    is_sharded = config.distributed_training.ddp_backend == "fully_sharded"
    holders = place.world_size if is_sharded else 1
    share = (1 + config.model.get("expert_replicas", 0) / place.num_experts) / place.size  # of all experts, copies too
    held = (of.total - of.expert_parameters) / holders + of.expert_parameters * share
    trained = (of.trained - of.trained_experts) / holders + of.trained_experts * share
    weight, copies = KEPT["fp32" if is_sharded and precision == "fp16" else precision]
    state = 4 if not config.optimizer.get("fp16_adam_stats", False) else 2
    states = STATES.get(config.optimizer._name, 0)
    if config.optimizer._name == "sgd":
        states = int(config.optimizer.momentum > 0)
    return round(weight * held + (weight + copies + state * states) * trained + of.buffer_bytes)


def describe(of: Sizes, config: DictConfig, ranks: int) -> str:
    """Describe a rank's memory and its experts, for people.

    Raises:
        UserError: as in `place_of`.
    """
    place, name = place_of(config, ranks), config.optimizer._name
    lacks = "" if name == "sgd" or name in STATES else f", without the state of {name}"
    who = place.describe()
    if (placement := config.model.get("expert_placement", CONTIGUOUS)) != CONTIGUOUS:
        replicas = config.model.get("expert_replicas", 0)
        what = f"{place.num_experts} experts" + (f" and {replicas} replicas" if replicas else "")
        who = f"{place.size} ranks share {what} by --expert-placement {placement} (--loads shows it)"
    experts = f", {who}" if of.expert_parameters > of.memory_parameters else ""
    gigabytes = state_bytes(of, config, place) / 1e9
    return f"{gigabytes:.3g} GB a rank, {precision_of(config)}{lacks}{experts}; activations come on top"
