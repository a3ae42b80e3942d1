"""The router of StableMoE: it learns where tokens go, then fixes it by token id. Shape suffixes: see `losses`."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.assignment import Assignment
from fairseq_hash.moe.kernels.group_sizes import count_groups
from fairseq_hash.moe.routers.registry import RouterSettings, register_router
from fairseq_hash.moe.routing_context import RoutedTokens
from fairseq_hash.moe.routing_stats import statistic
from fairseq_hash.moe.seeding import seeded_generator

BLOCK = 4096  # symbols that are scored at once when the table is made


@dataclass(frozen=True)
class StableStatistics:
    """What a StableMoE router logs; the losses are differentiable, and 0 in stage 2."""

    agreement: Tensor = statistic("share of tokens for which distilled and learned router choose the same expert")
    balance_loss: Tensor = statistic("balance loss of stage 1, without its weight; 0: balanced", "load_balance_weight")
    distill_loss: Tensor = statistic(
        "cross-entropy of the distilled router against the learned one in stage 1, nats", "distill_weight"
    )


@register_router("stablemoe")
class StableRouter(nn.Module):
    """Top-1 routing in two stages; a sigmoid gate in both.

    StableMoE (Dai et al. 2022, arXiv 2204.08396), section 3, and `fairseq/modules/moe_layer.py` of the authors'
    release (Hunter-DDM/stablemoe). In stage 1 a token goes to the nearest centroid, and a light router learns to choose
    the same expert from the token's id alone: a narrow embedding and centroids of its own. Its loss reaches nothing
    else. In stage 2 the light router is frozen and chooses alone; the gate is still learned. In evaluation the light
    router chooses in both stages, as in the release.

    Stage 2 routes by a table, `expert_V`: what the light router says for each token id at the end of stage 1. So
    nothing that an optimizer still does to its weights (momentum, weight decay) can move a token.

    One difference: the balance loss counts tokens over each rank's batch, as Switch's does here, not over all ranks'.
    """

    top_k = 1
    statistics = StableStatistics
    sees_tokens = True
    expert_V: Tensor
    updates: Tensor

    def __init__(
        self, model_width: int, num_experts: int, vocabulary: int, learning_updates: int, light_width: int, key: int
    ) -> None:
        """Make both routers.

        Args:
            model_width: D.
            num_experts: E.
            vocabulary: V.
            learning_updates: updates of stage 1.
            light_width: width of the light router's embedding.
            key: of the random numbers.
        """
        super().__init__()
        self.learning_updates = learning_updates
        generator = seeded_generator("stablemoe router", key)
        self.centroids = nn.Parameter(torch.empty(num_experts, model_width))
        self.light_centroids = nn.Parameter(torch.empty(num_experts, light_width))
        for centroids in (self.centroids, self.light_centroids):
            nn.init.orthogonal_(centroids, gain=0.1, generator=generator)
        embedding_VC = torch.empty(vocabulary, light_width).normal_(generator=generator)
        self.light_embedding = nn.Embedding.from_pretrained(embedding_VC, freeze=False)
        self.register_buffer("expert_V", torch.full((vocabulary,), -1))  # there is no table in stage 1
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._updates = 0  # the same on the host: reading the buffer would wait for the device

    @classmethod
    def build(cls, settings: RouterSettings) -> "StableRouter":
        """Make the router of one layer."""
        options = settings.options
        return cls(
            settings.model_width,
            settings.num_experts,
            settings.vocabulary,
            options.stable_updates,
            options.stable_width,
            settings.layer,
        )

    @property
    def is_fixed(self) -> bool:
        """Whether stage 2 has begun."""
        return self._updates >= self.learning_updates

    def after_update(self, tokens_per_expert_E: Tensor) -> None:
        """Count an update of stage 1, and the first one of stage 2.

        No further ones: checkpoints of stage 2 then differ in nothing that cannot be averaged.
        """
        if self._updates <= self.learning_updates:
            self.updates += 1
            self._updates += 1

    def forward(self, x_TD: Tensor, tokens: RoutedTokens) -> Assignment:
        """Assign `x_TD` (any floating dtype) with the ids in `tokens` to experts."""
        # Autocast would take the matrix products back to half precision.
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TE = F.linear(x_TD.float(), self.centroids.float())
            learned_T = score_TE.detach().argmax(dim=-1)
            # Without tokens the loss is 0, and the weights still have gradients, which data parallelism waits for.
            distilled = slice(0, 0) if self.is_fixed else slice(None)
            light_TE = self._light_scores(tokens.id_T[distilled])
            light_T = self._table()[tokens.id_T] if self.is_fixed else light_TE.detach().argmax(dim=-1)
            expert_T = learned_T if self.training and not self.is_fixed else light_T
            gate_T = score_TE.gather(1, expert_T.unsqueeze(1)).squeeze(1).sigmoid()
            number = max(len(expert_T), 1)
            statistics = StableStatistics(
                (light_T == learned_T).sum() / number,
                gate_T.new_zeros(()) if self.is_fixed else balance_loss(gate_T, expert_T, score_TE.shape[1]),
                F.cross_entropy(light_TE, learned_T[distilled], reduction="sum") / number,
            )
            return Assignment(expert_T.unsqueeze(1), gate_T.unsqueeze(1), statistics)

    def _light_scores(self, id_T: Tensor) -> Tensor:
        return F.linear(self.light_embedding(id_T).float(), self.light_centroids.float())

    @torch.no_grad()
    def _table(self) -> Tensor:
        """Return the expert of each token id, int64 `[V]`."""
        # Made in the first passes of stage 2, before its first update changes the weights: only within a pass are the
        # weights whole under fully sharded data parallel.
        if self._updates == self.learning_updates:
            for id_T in torch.arange(len(self.expert_V), device=self.expert_V.device).split(BLOCK):
                self.expert_V[id_T] = self._light_scores(id_T).argmax(dim=-1)
        return self.expert_V

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the stage with the weights. A table that was made stays, whatever the updates of stage 1 are here.

        Raises:
            UserError: if the table should have been made at an update that is past.
        """
        updates, expert_V = (state_dict.get(prefix + name) for name in ("updates", "expert_V"))
        if updates is not None and expert_V is not None:
            self._updates = int(updates)
            if (expert_V >= 0).all():
                self.learning_updates = min(self.learning_updates, self._updates - 1)
            elif self._updates > self.learning_updates:
                raise UserError(
                    f"it has {self._updates:,} updates and still learns its routing; give --stable-updates "
                    f"{self._updates} or more"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def balance_loss(gate_T: Tensor, expert_T: Tensor, num_experts: int) -> Tensor:
    """Return the mean over tokens of (load of the token's expert / mean load - 1) x gate: 0 at perfect balance.

    StableMoE (Dai et al. 2022), section 3, there a sum over tokens. It lowers the gates of crowded experts and raises
    those of others. The gradient flows through the gates only.

    Args:
        gate_T: sigmoid of each token's score for its expert, fp32.
        expert_T: int64, the expert of each token.
        num_experts: E.

    Returns:
        A scalar, fp32; 0 without tokens.
    """
    tokens = max(len(expert_T), 1)
    excess_E = count_groups(expert_T, num_experts) * num_experts / tokens - 1
    return (excess_E[expert_T] * gate_T).sum() / tokens
