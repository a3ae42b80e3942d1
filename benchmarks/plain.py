"""The dense model in a plain PyTorch loop: the time of the same work outside fairseq, as most people would write it.

The model is that of fairseq's decoder as `train.py` sets it up: pre-norm layers of causal attention and a ReLU FFN, a
last norm, fixed sinusoidal positions, the embedding scaled by the root of the width and shared with the output, no
dropout. `PlainModel.like` takes over the weights, so that both models have the same loss.

An update is gradient clipping and AdamW without decay, which is Adam: fused, with fp32 weights. With bf16 the products
run under autocast. Nothing waits for the device.

Shape suffixes: see `fairseq_hash.moe.losses`; V is the vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAM = ("lr", "betas", "eps", "weight_decay")  # its options, which are those of fairseq's


class PlainLayer(nn.Module):
    """Attention and FFN, each computed from the normed x and added to x."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return x of the same shape."""
        sentences, length, width = x_BLD.shape
        qkv = self.qkv(self.attention_norm(x_BLD)).view(sentences, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BLD = x_BLD + self.attention_out(mixed.transpose(1, 2).reshape(sentences, length, width))
        return x_BLD + self.fc2(F.relu(self.fc1(self.feed_forward_norm(x_BLD))))


class PlainModel(nn.Module):
    """The language model with its loss.

    Args:
        embedding_VD: weights of the embedding and of the output.
        position_LD: the vector added at each position.
        hidden: width within an FFN.
        heads: of attention.
        layers: their number.
        padding: the token without a loss. It is at the end of a sentence, where causal attention never sees it.
    """

    def __init__(
        self, embedding_VD: Tensor, position_LD: Tensor, hidden: int, heads: int, layers: int, padding: int
    ) -> None:
        super().__init__()
        width = embedding_VD.shape[1]
        self.padding, self.scale = padding, width**0.5
        self.embedding = nn.Embedding.from_pretrained(embedding_VD, freeze=False)
        self.register_buffer("position_LD", position_LD)
        self.layers = nn.ModuleList(PlainLayer(width, hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, token_BL: Tensor, target_BL: Tensor) -> Tensor:
        """Return the mean cross-entropy per token, in nats."""
        x_BLD = self.scale * self.embedding(token_BL) + self.position_LD[: token_BL.shape[1]]
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        logits_BLV = F.linear(self.norm(x_BLD), self.embedding.weight)
        return F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), ignore_index=self.padding)

    @classmethod
    @torch.no_grad()
    def like(cls, decoder: nn.Module, context: int) -> "PlainModel":
        """Return fairseq's dense decoder as a plain model in fp32, on the same device, with copies of its weights."""
        first = decoder.padding_idx + 1  # fairseq's positions begin there
        embedding_VD = decoder.embed_tokens.weight.detach().float().clone()
        position_LD = decoder.embed_positions.weights[first : first + context].to(embedding_VD)
        fc1, heads = decoder.layers[0].fc1, decoder.layers[0].self_attn.num_heads
        model = cls(embedding_VD, position_LD, fc1.out_features, heads, len(decoder.layers), decoder.padding_idx)
        model.to(embedding_VD.device)
        model.norm.load_state_dict(decoder.layer_norm.state_dict())
        for own, theirs in zip(model.layers, decoder.layers, strict=True):
            attention = theirs.self_attn
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            own.qkv.weight.copy_(torch.cat([projection.weight for projection in projections]))
            own.qkv.bias.copy_(torch.cat([projection.bias for projection in projections]))
            own.attention_out.load_state_dict(attention.out_proj.state_dict())
            own.attention_norm.load_state_dict(theirs.self_attn_layer_norm.state_dict())
            own.feed_forward_norm.load_state_dict(theirs.final_layer_norm.state_dict())
            own.fc1.load_state_dict(theirs.fc1.state_dict())
            own.fc2.load_state_dict(theirs.fc2.state_dict())
        return model


class PlainLoop:
    """Updates of a plain model; `compiled` by torch.compile, forward with the loss, and backward.

    `adam` has the values of `ADAM`.
    """

    def __init__(self, model: PlainModel, adam: dict[str, Any], clip_norm: float, bf16: bool, compiled: bool) -> None:
        self.model, self.clip_norm, self.bf16 = model, clip_norm, bf16
        self.device = model.position_LD.device
        self.loss = torch.compile(model, dynamic=False) if compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), **adam, fused=True)

    def train_step(self, batch: dict[str, Any]) -> Tensor:
        """Make one update with a batch of fairseq's; return the loss before it."""
        tokens = batch["net_input"]["src_tokens"], batch["target"]
        token_BL, target_BL = (token.to(self.device, non_blocking=True) for token in tokens)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(token_BL, target_BL)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.detach()
