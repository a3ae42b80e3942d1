"""Size and cost of an experiment's model, counted on the model itself, which is built without memory for weights.

Work is counted in multiply-adds of matrix products (2 FLOPs each), as in PyTorch's FlopCounterMode. Look-ups in
embeddings and memories, biases, norms and activations are left out.
"""

import logging
from dataclasses import dataclass, replace

import torch
from fairseq.data import Dictionary
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.compose import Experiment
from fairseq_hash.fairseq_patches.registry import replaced
from fairseq_hash.hashing.registry import BUILDERS
from fairseq_hash.lm.model import HashTransformerLanguageModel
from fairseq_hash.moe.memory import MemoryLayer
from fairseq_hash.moe.parameter_counts import (
    count_experts,
    count_parameters,
    count_trained,
    count_trained_experts,
    layers_and_dense,
)

BACKWARD = 2  # a backward pass has two products for each product of the forward pass


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model and one training.

    Attributes:
        total: parameters.
        active: parameters that one token uses.
        expert_parameters: parameters of `total` that belong to experts; a memory's rows are among them.
        memory_parameters: parameters of `expert_parameters` that are rows of memories.
        trained: parameters of `total` that are not frozen.
        trained_experts: parameters of all experts that are not frozen.
        buffer_bytes: of hash tables and other buffers, on every rank.
        flops_per_token: of a forward pass, without attention over the context.
        attention_flops_per_token: of the products of attention over a full context.
        tokens_per_update: the batch of all ranks, as configured.
        updates: of the whole training.
    """

    total: int
    active: int
    expert_parameters: int
    memory_parameters: int
    trained: int
    trained_experts: int
    buffer_bytes: int
    flops_per_token: int
    attention_flops_per_token: int
    tokens_per_update: int
    updates: int

    @property
    def training_flops(self) -> float:
        """FLOPs of the whole training, forward and backward."""
        per_token = (1 + BACKWARD) * (self.flops_per_token + self.attention_flops_per_token)
        return float(per_token) * self.tokens_per_update * self.updates


def sizes(experiment: Experiment, ranks: int = 1) -> Sizes:
    """Return the sizes of an experiment for its stated vocabulary, trained on `ranks` ranks.

    Raises:
        UserError: for options that the model refuses, or if the experiment states no vocabulary.
    """
    model = build_on_meta(experiment)
    config, (layers, _) = experiment.config, layers_and_dense(model)
    total, active = count_parameters(model)
    attention = 4 * config.model.decoder_embed_dim * config.task.tokens_per_sample * config.model.decoder_layers
    # Without --update-freq-ranks the batch grows with the ranks.
    batches = config.optimization.update_freq[0] * (config.criterion.get("update_freq_ranks", 0) or ranks)
    return Sizes(
        total,
        active,
        count_experts(layers),
        count_experts([layer for layer in layers if isinstance(layer, MemoryLayer)]),
        count_trained(model),
        count_trained_experts(layers),
        sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        2 * _multiplications(model),
        attention,
        config.dataset.max_tokens * batches,
        config.optimization.max_update,
    )


def dense_twin(experiment: Experiment) -> Experiment:
    """Return the experiment without its experts; everything else is the same."""
    config = OmegaConf.create(OmegaConf.to_container(experiment.config))
    config.model.router, config.model.freeze, config.model.from_dense = "none", "none", ""
    return replace(experiment, config=config)


def _multiplications(model: nn.Module) -> int:
    """Return the number of weights with which one token is multiplied.

    Every weight matrix counts, except embeddings that no product uses (the output projection may share its weight with
    the embedding). So does the matrix of a router that never trains, which is a buffer. Of a stack of experts, only
    those that serve one token count.
    """
    layers, dense = layers_and_dense(model)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    # An adaptive softmax has matrices of its own, and a rare word needs all of them.
    outputs = [] if model.decoder.output_projection is None else [model.decoder.output_projection.weight]
    count = sum(weight.numel() for weight in outputs)
    counted = embeddings | {id(weight) for weight in outputs}
    weights = [*dense, *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    count += sum(weight.numel() for weight in weights if weight.dim() == 2 and id(weight) not in counted)
    for layer in layers:
        if isinstance(layer, MemoryLayer):  # its rows are looked up, its projections are counted above
            continue
        matrices = sum(p[0].numel() for p in layer.experts.parameters() if p.dim() == 3)
        shared = 0 if layer.shared is None else sum(p[0].numel() for p in layer.shared.parameters() if p.dim() == 3)
        # The shared expert is a stack of one expert: its matrices have three dimensions, and were not counted above.
        count += layer.top_k * matrices + shared
    return count


def build_on_meta(experiment: Experiment) -> nn.Module:
    """Build an experiment's model on PyTorch's meta device: all shapes, no memory, and all experts on one rank.

    A table file or a predicting model need not exist: neither changes a size.
    """
    config = without_files(OmegaConf.create(OmegaConf.to_container(experiment.config)))
    config.model.expert_parallel_size, config.model.expert_dispatch = 0, "all-to-all"
    task = made_task(config, vocabulary_of(experiment))
    log = logging.getLogger("fairseq_hash.model")  # of a model that is trained; this one is not
    with torch.device("meta"), replaced(log, "disabled", True):
        return HashTransformerLanguageModel.build_model(config.model, task)


def vocabulary_of(experiment: Experiment) -> int:
    """Return how many symbols an experiment's dictionary has. Raises `UserError` if it does not say."""
    vocabulary = experiment.about.get("vocabulary")
    if not vocabulary:
        raise UserError(f"{experiment.name} states no experiment.vocabulary, so its size is not known")
    return int(vocabulary)


def without_files(config: DictConfig) -> DictConfig:
    """Change a configuration so that its model needs no table file, predicting model, text or loads; return it."""
    model = config.model
    if any(table.strip() not in BUILDERS for table in model.hash_table.split(",")):
        model.hash_table, model.hash_feature = "random", "token"
    if model.hash_predictor:
        model.hash_predictor, model.hash_feature = "", "token"
    model.hash_count_eos, model.expert_placement, model.expert_replicas = False, "contiguous", 0
    return config


def made_task(config: DictConfig, vocabulary: int) -> LanguageModelingTask:
    """Return the task of a configuration for a dictionary of so many made symbols."""
    dictionary = Dictionary()
    dictionary.symbols += [str(number) for number in range(vocabulary)]
    dictionary.count += range(vocabulary, 0, -1)
    dictionary.indices.update({symbol: place for place, symbol in enumerate(dictionary.symbols)})
    return LanguageModelingTask(config.task, dictionary)
