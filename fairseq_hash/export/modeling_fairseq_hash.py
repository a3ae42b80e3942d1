"""A language model with sparse feed-forward layers, as trained by fairseq_hash, in plain PyTorch.

This file needs torch and transformers only; `config.json` beside it says which of its parts a model has. Parameters
have the same names as in fairseq's checkpoint.

Shape suffixes: B batch, L length of the new tokens, P length including the cached tokens, T tokens without padding, D
model width, F hidden width, E experts, K experts per token, H rows of a hash table.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# Newer versions of transformers call it `cache`.
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


# What `config.json` says, and what holds if it says nothing: sizes of the smallest model, without experts.
DEFAULTS = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
DEFAULTS |= {"input_size": None, "output_size": None, "max_position_embeddings": 1024, "positions": "sinusoidal"}
DEFAULTS |= {"activation_function": "relu", "normalize_before": True, "final_norm": True, "layernorm_embedding": False}
DEFAULTS |= {"scale_embedding": True, "share_embeddings": False, "sparse_placement": "replace", "sparse_layers": ()}
DEFAULTS |= {"num_experts": 1, "expert_form": "plain", "expert_sublayers": 1, "swiglu_limit": 0.0}
DEFAULTS |= {"shared_expert": False, "eval_capacity_factor": 0.0, "hash_feature": "token", "hash_length": 0}
DEFAULTS |= {"multi_hash": 1, "experts_per_token": 1, "hash_weights": "uniform", "hash_score": "softmax"}
DEFAULTS |= {"hash_scale": 1.0, "tables": (), "gate": "value", "expert_layer_norm": False}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}


class FairseqHashConfig(PretrainedConfig):
    """The model's sizes and options.

    They have the names of fairseq's options if there are such; the docs of fairseq_hash explain them.

    `sparse_layers` has for each sparse layer the number of its decoder layer, its router (hash, switch or base) and,
    of hash layers, the number of its table; `tables` has the shapes of each table's tensors by their names.
    """

    model_type = "fairseq_hash"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(self, **given: object) -> None:
        for name, value in DEFAULTS.items():
            setattr(self, name, given.pop(name, value))
        # With `share_embeddings` input and output have one matrix: there is no second one for transformers to tie.
        given["tie_word_embeddings"] = False
        super().__init__(**{**SPECIAL, **given})


def shifted(token_BP: Tensor, distance: int, padding: int) -> Tensor:
    """Return the token `distance` positions before each token (after it, if negative); padding if there is none."""
    if abs(distance) >= token_BP.shape[1]:
        return torch.full_like(token_BP, padding)
    return F.pad(token_BP, (distance, -distance), value=padding)


def split_mix(key: Tensor) -> Tensor:
    """Mix 64-bit keys: SplitMix64 (Steele, Lea, Flood 2014) in int64, whose products and sums wrap."""

    def shift(value: Tensor, bits: int) -> Tensor:  # right, filling with zeros; torch fills with the sign
        return (value >> bits) & (2 ** (64 - bits) - 1)

    key = key + (0x9E3779B97F4A7C15 - 2**64)
    key = (key ^ shift(key, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    key = (key ^ shift(key, 27)) * (0x94D049BB133111EB - 2**64)
    return key ^ shift(key, 31)


class HashTable(nn.Module):
    """A table of experts, and how a token finds its row: Hash Layers (Roller et al. 2021), section 3.1."""

    def __init__(self, config: FairseqHashConfig, shapes: dict) -> None:
        super().__init__()
        self.feature, self.length, self.padding = config.hash_feature, config.hash_length, config.pad_token_id
        for name, shape in shapes.items():
            dtype = torch.bool if name in ("heavy", "begins", "ends") else torch.int64
            self.register_buffer(name, torch.zeros(tuple(shape), dtype=dtype))

    @property
    def looks_back(self) -> bool:
        """Whether a token's row depends on the tokens before it."""
        return self.feature not in ("token", "position") or hasattr(self, "pair")

    def forward(self, token_BP: Tensor) -> Tensor:
        """Return the experts of each token, `[B, P, K]`; at padding, any experts."""
        return self.expert[self.rows(token_BP)]

    def rows(self, token_BP: Tensor) -> Tensor:
        """Return the row of each token, `[B, P]`."""
        previous_BP = shifted(token_BP, 1, self.padding)
        if self.feature == "token":
            return self.spread_rows(token_BP, previous_BP) if hasattr(self, "pair") else token_BP
        if self.feature == "previous":
            return previous_BP
        if self.feature == "future":  # an oracle
            return shifted(token_BP, -1, self.padding)
        if self.feature == "position":
            return (token_BP.ne(self.padding).cumsum(dim=1) - 1) % len(self.expert)
        if self.feature == "word":
            return self.word_rows(token_BP)
        newest, oldest = {"bigram": (0, 1), "ngram": (0, self.length - 1), "history": (1, self.length)}[self.feature]
        state_BP = torch.zeros_like(token_BP)
        for distance in range(oldest, newest - 1, -1):
            state_BP = split_mix(state_BP ^ shifted(token_BP, distance, self.padding))
        return (state_BP & (2**63 - 1)) % len(self.expert)

    def spread_rows(self, token_BP: Tensor, previous_BP: Tensor) -> Tensor:
        """Give frequent ("heavy") tokens the row of their pair with the token before them, else that token's row."""
        row_BP = torch.where(self.heavy[token_BP], previous_BP, token_BP)
        if not len(self.pair):
            return row_BP
        pair_BP = token_BP * len(self.heavy) + previous_BP
        place_BP = torch.searchsorted(self.pair, pair_BP).clamp(max=len(self.pair) - 1)
        return torch.where(self.pair[place_BP] == pair_BP, len(self.heavy) + place_BP, row_BP)

    def word_rows(self, token_BP: Tensor) -> Tensor:
        """Give each piece the row of the word that it completes, if the larger dictionary has that word."""
        place_P = torch.arange(token_BP.shape[1], device=token_BP.device)
        begins_BP = self.begins[token_BP]
        begins_BP[:, 1:] |= self.ends[token_BP[:, :-1]]
        pieces_BP = place_P - (place_P * begins_BP).cummax(dim=1).values + 1
        hash_BP, power_BP = self.piece_hash[token_BP], self.piece_power[token_BP]
        for distance in range(1, min(16, token_BP.shape[1])):
            older_BP = torch.cat([token_BP[:, :distance], token_BP[:, :-distance]], dim=1)
            joined_BP = self.piece_hash[older_BP] * power_BP + hash_BP
            within_BP = pieces_BP > distance
            hash_BP = torch.where(within_BP, joined_BP, hash_BP)
            power_BP = torch.where(within_BP, self.piece_power[older_BP] * power_BP, power_BP)
        place_BP = torch.searchsorted(self.word_hash, hash_BP).clamp(max=len(self.word_hash) - 1)
        is_word_BP = (self.word_hash[place_BP] == hash_BP) & (pieces_BP <= 16)
        return torch.where(is_word_BP, len(self.begins) + place_BP, token_BP)


class PlainExperts(nn.Module):
    """Linear, activation, linear, for each of E experts.

    With N segments (MultiHash), group e * N + n is the n-th segment of expert e's hidden layer. The segments of a
    token's N groups make up one hidden layer.
    """

    def __init__(self, config: FairseqHashConfig, experts: int, segments: int = 1) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.segments, self.size = segments, hidden // segments
        self.activation = ACTIVATIONS[config.activation_function]
        self.fc1_weight = nn.Parameter(torch.empty(experts, hidden, width))
        self.fc1_bias = nn.Parameter(torch.empty(experts, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(experts, width, hidden))
        self.fc2_bias = nn.Parameter(torch.empty(experts, width))

    def forward(self, x_RD: Tensor, group: int) -> Tensor:
        """Apply one group to rows."""
        expert, segment = divmod(group, self.segments)
        piece = slice(segment * self.size, (segment + 1) * self.size)
        hidden_RF = self.activation(F.linear(x_RD, self.fc1_weight[expert, piece], self.fc1_bias[expert, piece]))
        return F.linear(hidden_RF, self.fc2_weight[expert, :, piece], self.fc2_bias[expert] / self.segments)


class GatedExperts(nn.Module):
    """SwiGLU without biases, for each of E experts. Gate and up are one parameter, gate first."""

    def __init__(self, config: FairseqHashConfig, experts: int) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.limit = config.swiglu_limit
        self.gate_up_weight = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down_weight = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_RD: Tensor, expert: int) -> Tensor:
        """Apply one expert to rows."""
        gate_RF, up_RF = F.linear(x_RD, self.gate_up_weight[expert]).chunk(2, dim=1)
        if self.limit:
            gate_RF, up_RF = gate_RF.clamp(max=self.limit), up_RF.clamp(-self.limit, self.limit)
        return F.linear(F.silu(gate_RF) * up_RF, self.down_weight[expert])


class StackedExperts(nn.Module):
    """A chain of x + FFN(LayerNorm(x)) for each of E experts, as BASE Layers (Lewis et al. 2021) insert it."""

    def __init__(self, config: FairseqHashConfig, experts: int) -> None:
        super().__init__()
        sublayers, width = range(config.expert_sublayers), config.hidden_size
        self.norm_weight = nn.ParameterList(nn.Parameter(torch.empty(experts, width)) for _ in sublayers)
        self.norm_bias = nn.ParameterList(nn.Parameter(torch.empty(experts, width)) for _ in sublayers)
        self.feed_forward = nn.ModuleList(PlainExperts(config, experts) for _ in sublayers)

    def forward(self, x_RD: Tensor, expert: int) -> Tensor:
        """Return the vectors that one expert adds to rows."""
        y_RD = x_RD
        for weight_ED, bias_ED, feed_forward in zip(self.norm_weight, self.norm_bias, self.feed_forward, strict=True):
            normed_RD = F.layer_norm(y_RD, y_RD.shape[-1:], weight_ED[expert], bias_ED[expert])
            y_RD = y_RD + feed_forward(normed_RD, expert)
        return y_RD - x_RD


class SwitchRouter(nn.Module):
    """The most probable expert, weighted by its probability: Switch Transformers (Fedus et al. 2021)."""

    def __init__(self, config: FairseqHashConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TD: Tensor) -> "tuple[Tensor, Tensor]":
        """Return experts and weights, `[T, 1]`."""
        weight_T1, expert_T1 = F.linear(x_TD.float(), self.weight.float()).softmax(dim=-1).max(dim=-1, keepdim=True)
        return expert_T1, weight_T1


class BaseRouter(nn.Module):
    """The expert with the best score, weighted by the score's sigmoid: BASE Layers in evaluation."""

    def __init__(self, config: FairseqHashConfig) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TD: Tensor) -> "tuple[Tensor, Tensor]":
        """Return experts and weights, `[T, 1]`."""
        score_T1, expert_T1 = F.linear(x_TD.float(), self.centroids.float()).max(dim=-1, keepdim=True)
        return expert_T1, score_T1.sigmoid()


class HashWeights(nn.Module):
    """Learned weights of the K experts in a table's row: scores divided by the sum over the K, times a scale."""

    def __init__(self, config: FairseqHashConfig) -> None:
        super().__init__()
        self.score, self.scale = config.hash_score, config.hash_scale
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TD: Tensor, expert_TK: Tensor) -> Tensor:
        """Return weights, fp32 `[T, K]`."""
        logit_TK = F.linear(x_TD.float(), self.weight.float()).gather(1, expert_TK)
        # Scores divided by their sum are the softmax of their logarithms, in which nothing underflows.
        if self.score == "sigmoid":
            logit_TK = F.logsigmoid(logit_TK)
        elif self.score == "sqrt-softplus":
            log_TK = F.softplus(logit_TK.clamp(min=-20)).log()
            logit_TK = torch.where(logit_TK < -20, logit_TK, log_TK) / 2
        return logit_TK.softmax(dim=-1) * self.scale


class SparseLayer(nn.Module):
    """Experts with a router, or with the experts that a hash table names for the tokens."""

    def __init__(self, config: FairseqHashConfig, router: str) -> None:
        super().__init__()
        self.is_hash = router == "hash"
        self.segments = config.multi_hash if self.is_hash else 1
        self.groups = config.num_experts * self.segments
        self.capacity_factor = config.eval_capacity_factor
        self.share = config.hash_scale / config.experts_per_token
        self.gate = config.gate
        inserted, gated = config.sparse_placement == "insert", config.expert_form == "swiglu"

        def build(experts: int, segments: int) -> nn.Module:
            if gated:
                return GatedExperts(config, experts)
            return StackedExperts(config, experts) if inserted else PlainExperts(config, experts, segments)

        self.experts = build(config.num_experts, self.segments)
        self.shared = build(1, 1) if config.shared_expert else None
        self.norm = nn.LayerNorm(config.hidden_size) if config.expert_layer_norm else None
        self.router = None
        if not self.is_hash:
            self.router = {"switch": SwitchRouter, "base": BaseRouter}[router](config)
        elif config.hash_weights == "learned":
            self.router = HashWeights(config)

    def forward(self, x_BLD: Tensor, real_BL: Tensor, expert_BLK: "Tensor | None") -> Tensor:
        """Return the experts' output: zero for padding, and for tokens beyond an expert's capacity."""
        # Position first, as in fairseq: whether a token is dropped does not depend on later positions.
        x_LBD, real_LB = x_BLD.transpose(0, 1), real_BL.t()
        x_TD = x_LBD[real_LB]
        if not self.is_hash:
            expert_TK, weight_TK = self.router(x_TD)
            if self.gate == "one":
                weight_TK = torch.full_like(weight_TK, 1 / weight_TK.shape[1])
        else:
            expert_TK, weight_TK = expert_BLK.transpose(0, 1)[real_LB], None
            if self.router is not None:
                weight_TK = self.router(x_TD, expert_TK)
            elif self.share != 1:
                weight_TK = torch.full(expert_TK.shape, self.share, device=x_TD.device)
        y_TD = self.apply_experts(x_TD, expert_TK, weight_TK)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD, 0)
        if self.norm is not None:
            y_TD = self.norm(x_TD + y_TD)
        y_LBD = torch.zeros_like(x_LBD)
        y_LBD[real_LB] = y_TD
        return y_LBD.transpose(0, 1)

    def apply_experts(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: "Tensor | None") -> Tensor:
        """Return the weighted sum of the outputs of each token's experts."""
        if self.segments > 1:  # expert e of the n-th hash function serves its n-th segment
            expert_TK = expert_TK * self.segments + torch.arange(self.segments, device=expert_TK.device)
        group_C, choices = expert_TK.flatten(), expert_TK.shape[1]
        capacity = len(group_C)
        if self.capacity_factor:  # rounded: 1.1 * 10 / 11 is 1.0000000000000002, and means 1
            capacity = math.ceil(round(len(group_C) * self.capacity_factor / self.groups, 6))
        y_TD = torch.zeros_like(x_TD)
        for group in group_C.unique().tolist():
            place_R = (group_C == group).nonzero().squeeze(1)[:capacity]
            row_RD = self.experts(x_TD[place_R // choices], group)
            if weight_TK is not None:
                row_RD = row_RD * weight_TK.flatten()[place_R, None].to(row_RD.dtype)
            y_TD = y_TD.index_add(0, place_R // choices, row_RD)
        return y_TD


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: FairseqHashConfig, number: int) -> None:
        super().__init__()
        self.number, self.heads, width = number, config.num_attention_heads, config.hidden_size
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x_BLD: Tensor, mask_B1LP: Tensor, cache: "DynamicCache | None") -> Tensor:
        """Return each position's attention over the positions that `mask_B1LP` allows, including cached ones."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (p(x_BLD).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in projections)
        if cache is not None:
            key, value = cache.update(key, value, self.number)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_B1LP)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """fairseq's decoder layer: attention and a feed-forward network, which can be a sparse layer."""

    def __init__(self, config: FairseqHashConfig, number: int, router: "str | None") -> None:
        super().__init__()
        self.normalize_before = config.normalize_before
        self.self_attn = Attention(config, number)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        if router is not None:
            self.sparse = SparseLayer(config, router)
        else:
            self.sparse = None
            self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
            self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
            self.activation = ACTIVATIONS[config.activation_function]

    def forward(
        self,
        x_BLD: Tensor,
        real_BL: Tensor,
        mask_B1LP: Tensor,
        expert_BLK: "Tensor | None",
        cache: "DynamicCache | None",
    ) -> Tensor:
        """Return `[B, L, D]`."""
        x_BLD = self.residual(x_BLD, self.self_attn_layer_norm, lambda x: self.self_attn(x, mask_B1LP, cache))
        if self.sparse is not None:
            return self.residual(x_BLD, self.final_layer_norm, lambda x: self.sparse(x, real_BL, expert_BLK))
        return self.residual(x_BLD, self.final_layer_norm, lambda x: self.fc2(self.activation(self.fc1(x))))

    def residual(self, x_BLD: Tensor, norm: nn.Module, block: object) -> Tensor:
        """Return x + block(x), with the norm before the block or after the sum."""
        return x_BLD + block(norm(x_BLD)) if self.normalize_before else norm(x_BLD + block(x_BLD))


class InsertedLayer(nn.Module):
    """An inserted sparse layer, after a decoder layer."""

    def __init__(self, config: FairseqHashConfig, router: str) -> None:
        super().__init__()
        self.sparse = SparseLayer(config, router)

    def forward(
        self, x_BLD: Tensor, real_BL: Tensor, mask_B1LP: Tensor, expert_BLK: "Tensor | None", cache: object
    ) -> Tensor:
        """Return `[B, L, D]`."""
        return x_BLD + self.sparse(x_BLD, real_BL, expert_BLK)


class Decoder(nn.Module):
    """fairseq's Transformer decoder."""

    def __init__(self, config: FairseqHashConfig) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        input_size, output_size = config.input_size or width, config.output_size or width
        self.embed_tokens = nn.Embedding(config.vocab_size, input_size, config.pad_token_id)
        self.embed_scale = math.sqrt(width) if config.scale_embedding else 1.0
        self.project_in_dim = nn.Linear(input_size, width, bias=False) if input_size != width else None
        self.embed_positions = None
        if config.positions == "learned":
            rows = config.max_position_embeddings + config.pad_token_id + 1
            self.embed_positions = nn.Embedding(rows, width, config.pad_token_id)
        self.layernorm_embedding = nn.LayerNorm(width) if config.layernorm_embedding else None
        sparse = {place["layer"]: place for place in config.sparse_layers}
        self.layers, self.table_of_layer = nn.ModuleList(), []
        for number in range(config.num_hidden_layers):
            router, table = sparse[number]["router"] if number in sparse else None, sparse.get(number, {}).get("table")
            inserts = router is not None and config.sparse_placement == "insert"
            self.layers.append(DecoderLayer(config, number, None if inserts else router))
            self.table_of_layer += [None, table] if inserts else [table]
            if inserts:
                self.layers.append(InsertedLayer(config, router))
        self.layer_norm = nn.LayerNorm(width) if config.final_norm else None
        self.project_out_dim = nn.Linear(width, output_size, bias=False) if output_size != width else None
        self.output_projection = None
        if not config.share_embeddings:
            self.output_projection = nn.Linear(output_size, config.vocab_size, bias=False)
        self.hash_tables = nn.ModuleList(HashTable(config, shapes) for shapes in config.tables)

    def forward(self, token_BP: Tensor, length: int, cache: "DynamicCache | None") -> "tuple[Tensor, list[Tensor]]":
        """Return the features of the last `length` positions, `[B, L, D]`, and the hidden states of all layers.

        Args:
            token_BP: the whole sequences; padding may be anywhere.
            length: L; earlier positions are in the cache.
            cache: keys and values of earlier positions.
        """
        real_BP = token_BP.ne(self.config.pad_token_id)
        real_BL, token_BL = real_BP[:, -length:], token_BP[:, -length:]
        x_BLD = self.embed_scale * self.embed_tokens(token_BL)
        if self.project_in_dim is not None:
            x_BLD = self.project_in_dim(x_BLD)
        if self.config.positions != "none":
            # fairseq counts the tokens without padding, from the id of padding plus one.
            position_BP = real_BP.cumsum(dim=1) * real_BP + self.config.pad_token_id
            x_BLD = x_BLD + self.positions(position_BP[:, -length:]).to(x_BLD.dtype)
        if self.layernorm_embedding is not None:
            x_BLD = self.layernorm_embedding(x_BLD)
        place_P = torch.arange(token_BP.shape[1], device=token_BP.device)
        earlier_LP = place_P <= place_P[-length:, None]
        # Padding attends to itself: it has nothing else, and a softmax over nothing may be NaN (it is in older torch).
        itself_LP = place_P == place_P[-length:, None]
        mask_B1LP = (earlier_LP & real_BP[:, None, None, :]) | itself_LP
        routes = [table(token_BP)[:, -length:] for table in self.hash_tables]
        states = [x_BLD]
        for layer, table in zip(self.layers, self.table_of_layer, strict=True):
            x_BLD = layer(x_BLD, real_BL, mask_B1LP, None if table is None else routes[table], cache)
            states.append(x_BLD)
        if self.layer_norm is not None:
            x_BLD = self.layer_norm(x_BLD)
        if self.project_out_dim is not None:
            x_BLD = self.project_out_dim(x_BLD)
        return x_BLD, states

    def positions(self, position_BL: Tensor) -> Tensor:
        """Return the embeddings of positions, `[B, L, D]`; zero at padding."""
        if self.config.positions == "learned":
            most = self.config.max_position_embeddings
            if position_BL.max() > most + self.config.pad_token_id:
                raise ValueError(f"a sequence has more than the {most} tokens that the model has positions for; cut it")
            return self.embed_positions(position_BL)
        half = self.config.hidden_size // 2
        frequency = torch.exp(
            torch.arange(half, dtype=torch.float, device=position_BL.device) * -(math.log(10000) / (half - 1))
        )
        angle = position_BL.float().unsqueeze(2) * frequency
        wave = F.pad(torch.cat([angle.sin(), angle.cos()], dim=2), (0, self.config.hidden_size % 2))
        return wave.masked_fill(position_BL.eq(self.config.pad_token_id).unsqueeze(2), 0)


class FairseqHashForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Tokens masked by `attention_mask` count as padding, like those with the id of padding."""

    config_class = FairseqHashConfig
    base_model_prefix = "decoder"
    _no_split_modules = ["DecoderLayer", "InsertedLayer"]
    _supports_sdpa = True

    def __init__(self, config: FairseqHashConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as they are: a trained model has all of them."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self.decoder.embed_tokens

    def get_output_embeddings(self) -> "nn.Module | None":
        """Return the output projection; None if it is the embedding of tokens."""
        return self.decoder.output_projection

    def forward(
        self,
        input_ids: "Tensor | None" = None,
        attention_mask: "Tensor | None" = None,
        cache: "DynamicCache | None" = None,
        past_key_values: "DynamicCache | None" = None,
        prefix_ids: "Tensor | None" = None,
        labels: "Tensor | None" = None,
        use_cache: "bool | None" = None,
        output_hidden_states: "bool | None" = None,
        logits_to_keep: int = 0,
        return_dict: "bool | None" = None,
        **kwargs: object,
    ) -> "CausalLMOutputWithPast | tuple":
        """Return logits `[B, L, vocab_size]` and, on request, the loss, the cache and the hidden states.

        Args:
            input_ids: int64 `[B, L]`, the tokens that are not in the cache yet.
            attention_mask: `[B, L]`, or `[B, P]` including the cached tokens; 0 at padding.
            cache: transformers' cache, for generation; `past_key_values` is its older name.
            prefix_ids: int64 `[B, P]`, the whole sequences, if a cache is used and a hash table looks at earlier
                tokens. `generate` gives them.
            labels: int64 `[B, L]`, usually `input_ids`; -100 is left out of the loss.
            use_cache: return a cache.
            output_hidden_states: also return the output of each layer.
            logits_to_keep: number of last positions whose logits are returned; 0 for all.
            return_dict: False for a tuple.
            kwargs: for the loss.
        """
        if input_ids is None:
            raise ValueError("give input_ids: hash tables look tokens up, so embeddings are not enough")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        token_BP = self.whole(input_ids, prefix_ids, cache.get_seq_length() if cache is not None else 0)
        if attention_mask is not None:
            left_out = attention_mask.eq(0)[:, -token_BP.shape[1] :]
            left_out = F.pad(left_out, (token_BP.shape[1] - left_out.shape[1], 0), value=False)
            token_BP = token_BP.masked_fill(left_out, self.config.pad_token_id)
        x_BLD, states = self.decoder(token_BP, input_ids.shape[1], cache)
        x_BLD = x_BLD[:, -logits_to_keep:]
        project = self.decoder.output_projection
        logits = F.linear(x_BLD, self.decoder.embed_tokens.weight) if project is None else project(x_BLD)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=tuple(states) if output_hidden_states else None, **{CACHE: cache}
        )
        return output.to_tuple() if return_dict is False else output

    def whole(self, input_ids: Tensor, prefix_ids: "Tensor | None", past: int) -> Tensor:
        """Return the whole sequences `[B, P]`, of which `past` positions are in the cache."""
        if past == 0:
            return input_ids
        if prefix_ids is not None and prefix_ids.shape[1] == past + input_ids.shape[1]:
            return prefix_ids
        if any(table.looks_back for table in self.decoder.hash_tables):
            raise ValueError(
                f"--hash-feature {self.config.hash_feature} looks at earlier tokens: give all {past} cached ones and "
                "input_ids as prefix_ids"
            )
        return F.pad(input_ids, (past, 0), value=self.config.eos_token_id)  # only their number counts

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: object, **kwargs: object) -> dict:
        """Return the arguments of the next `forward`: the usual ones and the whole prefix."""
        if self.config.hash_feature == "future":
            raise ValueError(
                "--hash-feature future is an oracle: it sees the next token, which generation does not have"
            )
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        inputs.pop("position_ids", None)  # counted from the tokens
        return {**inputs, "prefix_ids": input_ids}
