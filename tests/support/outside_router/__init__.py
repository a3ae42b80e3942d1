"""A router from outside, as users write one: `--user-dir outside_router --router random_top2`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_hash.moe.routers import Assignment, register_router, statistic


@dataclass(frozen=True)
class Top2Statistics:
    score_margin: Tensor = statistic("mean difference of the two largest scores")


@register_router("random_top2")
class RandomTop2(nn.Module):
    top_k, statistics = 2, Top2Statistics

    @classmethod
    def build(cls, settings):
        self, generator = cls(), torch.Generator().manual_seed(settings.layer)
        self.register_buffer("weight_ED", torch.randn(settings.num_experts, settings.model_width, generator=generator))
        return self

    def forward(self, x_TD):
        score_TK, expert_TK = (x_TD @ self.weight_ED.t()).topk(2, dim=1)
        margin = (score_TK[:, 0] - score_TK[:, 1]).sum() / max(len(x_TD), 1)
        return Assignment(expert_TK, score_TK.softmax(dim=1), Top2Statistics(margin))
