"""Naive per-token versions of every router and of the sparse layer, written from the papers.

One token at a time, plain loops, float64, no code shared with the package. Gradients come from autograd.
Parameters are read by name from the module under test.
"""

import math

import torch


def feed_forward(x_D, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation):
    """One expert: Linear, activation, Linear."""
    return fc2_weight @ activation(fc1_weight @ x_D + fc1_bias) + fc2_bias


def layer_norm(x_D, weight_D, bias_D):
    """LayerNorm of one token, epsilon 1e-5."""
    centred = x_D - x_D.mean()
    return centred / torch.sqrt((centred * centred).mean() + 1e-5) * weight_D + bias_D


def switch_route(x_TD, weight_ED):
    """Switch Transformers, section 2.1: softmax gate, top-1. Returns experts, gates, balance loss, z-loss, entropy."""
    experts, gates, log_sums, entropies, probabilities = [], [], [], [], []
    for x_D in x_TD:
        logits = [weight_D @ x_D for weight_D in weight_ED]
        total = sum(torch.exp(logit) for logit in logits)
        probability = [torch.exp(logit) / total for logit in logits]
        best = max(range(len(logits)), key=lambda e: probability[e].item())
        experts.append(best)
        gates.append(probability[best])
        log_sums.append(torch.log(total))
        entropies.append(-sum(p * torch.log(p) for p in probability))
        probabilities.append(probability)
    tokens, num_experts = len(experts), len(weight_ED)
    balance = 0.0
    for e in range(num_experts):
        share = experts.count(e) / tokens
        balance = balance + share * sum(p[e] for p in probabilities) / tokens
    z = sum(s * s for s in log_sums) / tokens
    return experts, gates, num_experts * balance, z, sum(entropies) / tokens


def stable_route(x_TD, ids, centroid_ED, light_EC, embedding_VC, is_training, table_V=None):
    """StableMoE, section 3: experts, gates, agreement, balance loss, distillation loss; stage 2 if there is a table."""
    learned = base_greedy(x_TD, centroid_ED)
    scores = [[embedding_VC[token] @ centroid_C for centroid_C in light_EC] for token in ids]
    light = [max(range(len(light_EC)), key=lambda e, s=score: s[e].item()) for score in scores]
    if table_V is not None:
        light = [table_V[token] for token in ids]
    experts = learned if is_training and table_V is None else light
    gates = base_gate(x_TD, centroid_ED, experts)
    tokens = len(ids)
    agreement = sum(one == other for one, other in zip(learned, light, strict=True)) / tokens
    if table_V is not None:
        return experts, gates, agreement, 0.0, 0.0
    mean, balance, distill = tokens / len(centroid_ED), 0.0, 0.0
    for expert, gate, score, target in zip(experts, gates, scores, learned, strict=True):
        balance = balance + (experts.count(expert) - mean) / mean * gate / tokens
        distill = distill - (score[target] - torch.log(sum(torch.exp(value) for value in score))) / tokens
    return experts, gates, agreement, balance, distill


def topk_route(x_TD, weight_ED, choices, score, bias_E, normalize, scale):
    """DeepSeek-V3, section 2.1.2, equations 12 to 16, for any score: chosen by score + bias, weighted by the score.

    Returns, token by token: experts, their weights, all scores, all scores over their sum, and the log-sum-exp.
    """
    chosen, weights, scores, shares, log_sums = [], [], [], [], []
    for x_D in x_TD:
        logits = [weight_D @ x_D for weight_D in weight_ED]
        total = sum(torch.exp(logit) for logit in logits)
        of_token = {
            "softmax": lambda logits=logits, total=total: [torch.exp(logit) / total for logit in logits],
            "sigmoid": lambda logits=logits: [1 / (1 + torch.exp(-logit)) for logit in logits],
            "sqrt-softplus": lambda logits=logits: [torch.sqrt(torch.log(1 + torch.exp(logit))) for logit in logits],
        }[score]()
        best = sorted(range(len(logits)), key=lambda e: -(of_token[e] + bias_E[e]).item())[:choices]
        below = sum(of_token[e] for e in best) if normalize else 1
        chosen.append(best)
        weights.append([of_token[e] / below * scale for e in best])
        scores.append(of_token)
        shares.append([s / sum(of_token) for s in of_token])
        log_sums.append(torch.log(total))
    return chosen, weights, scores, shares, log_sums


def balance_loss(chosen, shares, is_sequence_wise=False):
    """Switch, section 2.2, summed over the choices; or, of one sequence, DeepSeek-V3, equations 17 to 20."""
    tokens, num_experts, choices = len(chosen), len(shares[0]), len(chosen[0])
    loss = 0.0
    for e in range(num_experts):
        count = sum(e in best for best in chosen)
        loss = loss + count / tokens * sum(share[e] for share in shares) / tokens
    return num_experts * loss / (choices if is_sequence_wise else 1)


def gshard_gates(x_TD, weight_ED, capacity_factor, noise_TE=None, uniform_T=None):
    """GShard, algorithm 1: gates [T, E], the load-balancing loss, and how many choices found their expert full.

    `noise_TE` is added to the logits of the second experts; `uniform_T` decides which second choices are made. Weights
    are taken over the choices that were kept, as in fairscale.
    """
    tokens, num_experts = len(x_TD), len(weight_ED)
    capacity = math.ceil(round(2 * tokens * capacity_factor / num_experts, 6)) if capacity_factor else 2 * tokens
    logits_TE = torch.stack([torch.stack([weight_D @ x_D for weight_D in weight_ED]) for x_D in x_TD])
    probability_TE = torch.exp(logits_TE) / torch.exp(logits_TE).sum(dim=1, keepdim=True)
    firsts, seconds = [], []
    for t in range(tokens):
        order = sorted(range(num_experts), key=lambda e: -logits_TE[t, e].item())
        firsts.append(order[0])
        noise = [0.0] * num_experts if noise_TE is None else noise_TE[t].tolist()
        seconds.append(max(order[1:], key=lambda e: logits_TE[t, e].item() + noise[e]))
    balance = sum(firsts.count(e) / tokens * probability_TE[:, e].mean() for e in range(num_experts)) * num_experts
    taken, kept, dropped = [0] * num_experts, [[] for _ in range(tokens)], 0
    for rank, experts in enumerate((firsts, seconds)):
        for t, e in enumerate(experts):
            if rank == 1 and uniform_T is not None:
                first, second = probability_TE[t, firsts[t]], probability_TE[t, e]
                if 2 * second / (first + second) <= uniform_T[t]:
                    continue
            if taken[e] < capacity:
                kept[t].append(e)
            else:
                dropped += 1
            taken[e] += 1
    rows = []
    for t in range(tokens):
        total = sum(probability_TE[t, e] for e in kept[t])
        rows.append(
            torch.stack([probability_TE[t, e] / total if e in kept[t] else 0 * x_TD.sum() for e in range(num_experts)])
        )
    return torch.stack(rows), balance, dropped


def sinkhorn(score_TE, iterations):
    """Scale the rows of exp(scores) to sums of 1 / T, then the columns to 1 / E, in turn.

    Returns the matrix, fp64, and of each iteration how far a column's sum was from 1 / E, times E.
    """
    tokens, num_experts = len(score_TE), len(score_TE[0])
    entries = [[math.exp(score) for score in row] for row in score_TE]
    errors = []
    for _ in range(iterations):
        entries = [[entry / sum(row) / tokens for entry in row] for row in entries]
        columns = [sum(row[e] for row in entries) for e in range(num_experts)]
        errors.append(max(abs(column * num_experts - 1) for column in columns))
        entries = [
            [entry / column / num_experts for entry, column in zip(row, columns, strict=True)] for row in entries
        ]
    return torch.tensor(entries, dtype=torch.float64), errors


def expert_choice_gates(x_TD, weight_ED, factor):
    """Expert Choice, section 3.2: each expert takes the T x factor / E tokens of which its probability is largest."""
    tokens, num_experts = len(x_TD), len(weight_ED)
    logits_TE = torch.stack([torch.stack([weight_D @ x_D for weight_D in weight_ED]) for x_D in x_TD])
    probability_TE = torch.exp(logits_TE) / torch.exp(logits_TE).sum(dim=1, keepdim=True)
    mask_TE = torch.zeros(tokens, num_experts, dtype=x_TD.dtype)
    for e in range(num_experts):
        best_first = sorted(range(tokens), key=lambda t: -probability_TE[t, e].item())
        for t in best_first[: math.ceil(round(tokens * factor / num_experts, 6))]:
            mask_TE[t, e] = 1
    return mask_TE * probability_TE


def base_gate(x_TD, centroid_ED, experts):
    """BASE Layers, section 3.1: the sigmoid of the token's score for its expert."""
    return [torch.sigmoid(centroid_ED[e] @ x_D) for x_D, e in zip(x_TD, experts, strict=True)]


def base_greedy(x_TD, centroid_ED):
    """BASE Layers, section 3.3: at test time each token goes to its best expert."""
    return [max(range(len(centroid_ED)), key=lambda e: (centroid_ED[e] @ x_D).item()) for x_D in x_TD]


def balanced_value(score_TE):
    """The best total score of any balanced assignment, by trying SciPy's assignment for who gets one token more."""
    from itertools import combinations

    from scipy.optimize import linear_sum_assignment

    tokens, num_experts = score_TE.shape
    least, more = divmod(tokens, num_experts)
    best = -math.inf
    for larger in combinations(range(num_experts), more):
        seats = [e for e in range(num_experts) for _ in range(least + (e in larger))]
        rows, columns = linear_sum_assignment(score_TE[:, seats].numpy(), maximize=True)
        best = max(best, score_TE[:, seats].numpy()[rows, columns].sum())
    return best


def kept_under_capacity(experts, num_experts, capacity_factor, order=None):
    """Switch Transformers, section 2.2: an expert takes at most tokens / experts x factor tokens, first come first.

    `order` says in which order the choices come; None: one after the other.
    """
    if capacity_factor == 0:
        return [True] * len(experts)
    capacity = math.ceil(round(len(experts) * capacity_factor / num_experts, 6))
    taken = [0] * num_experts
    kept = [False] * len(experts)
    for choice in range(len(experts)) if order is None else order:
        kept[choice] = taken[experts[choice]] < capacity
        taken[experts[choice]] += 1
    return kept


def sparse_layer(x_TD, experts, gates, kept, parameters, activation, sublayers=0):
    """What the experts add to each token: zero where it was dropped.

    `parameters` are the experts' stacked parameters by name; `sublayers` above 0 means an inserted residual stack.
    """
    out = []
    for x_D, e, gate, keep in zip(x_TD, experts, gates, kept, strict=True):
        if not keep:
            out.append(torch.zeros_like(x_D))
            continue
        if sublayers == 0:
            names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
            y = feed_forward(x_D, *(parameters[name][e] for name in names), activation)
        else:
            h = x_D
            for n in range(sublayers):
                names = (f"feed_forward.{n}.{name}" for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))
                normed = layer_norm(h, parameters[f"norm_weight.{n}"][e], parameters[f"norm_bias.{n}"][e])
                h = h + feed_forward(normed, *(parameters[name][e] for name in names), activation)
            y = h - x_D
        out.append(gate * y)
    return torch.stack(out)


def balanced_hash(counts, num_experts):
    """Hash Layers: tokens by descending count, each to the expert with the smallest load, then fewest tokens."""
    load, tokens, table = [0] * num_experts, [0] * num_experts, [0] * len(counts)
    for token in sorted(range(len(counts)), key=lambda t: -counts[t]):
        e = min(range(num_experts), key=lambda e: (load[e], tokens[e], e))
        table[token] = e
        load[e] += counts[token]
        tokens[e] += 1
    return table


def splitmix64(state):
    """SplitMix64's next output after `state`, in Python integers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def multi_hash(x_D, experts, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation):
    """Hash Layers, MultiHash: the n-th hash function picks whose n-th piece the hidden layer has as its n-th piece."""
    size = fc1_weight.shape[1] // len(experts)
    pieces = [(e, slice(n * size, (n + 1) * size)) for n, e in enumerate(experts)]
    hidden = torch.cat([activation(fc1_weight[e][piece] @ x_D + fc1_bias[e][piece]) for e, piece in pieces])
    whole = torch.cat([fc2_weight[e][:, piece] for e, piece in pieces], dim=1)
    return whole @ hidden + torch.stack([fc2_bias[e] for e in experts]).mean(dim=0)


def gated_feed_forward(x_D, gate_up_weight, down_weight, limit):
    """SwiGLU as in DeepSeek-V4: silu(gate) * up, gate at most `limit`, up within it on both sides; 0 is no limit."""
    hidden = []
    half = len(gate_up_weight) // 2
    for gate_D, up_D in zip(gate_up_weight[:half], gate_up_weight[half:], strict=True):
        gate, up = gate_D @ x_D, up_D @ x_D
        if limit and gate > limit:
            gate = torch.full_like(gate, limit)
        if limit and abs(up) > limit:
            up = torch.full_like(up, limit if up > 0 else -limit)
        hidden.append(gate / (1 + torch.exp(-gate)) * up)
    return down_weight @ torch.stack(hidden)


def hash_weights(x_D, experts, weight_ED, score, scale):
    """DeepSeek-V4's hash layers: the scores of the experts that the table names, over their sum, times the scale."""
    logits = weight_ED @ x_D
    scores = {
        "softmax": lambda: torch.exp(logits) / torch.exp(logits).sum(),
        "sigmoid": lambda: 1 / (1 + torch.exp(-logits)),
        "sqrt-softplus": lambda: torch.sqrt(torch.log(1 + torch.exp(logits))),
    }[score]()
    total = sum(scores[e] for e in experts)
    return [scores[e] / total * scale for e in experts]


def feature_rows(sequence, name, length, padding, num_keys):
    """The row of each token of a sequence without padding, by the definitions of the features."""
    rows = []
    for place, token in enumerate(sequence):

        def at(other, sequence=sequence):
            return sequence[other] if 0 <= other < len(sequence) else padding

        window = {"bigram": (1, 0), "ngram": (length - 1, 0), "history": (length, 1)}.get(name)
        if window:
            state = 0
            for distance in range(window[0], window[1] - 1, -1):
                state = splitmix64(state ^ at(place - distance))
            rows.append((state & (2**63 - 1)) % num_keys)
        else:
            choices = {"token": token, "previous": at(place - 1), "future": at(place + 1), "position": place % num_keys}
            rows.append(choices[name])
    return rows


def word_keys(sequence, symbols, words):
    """For SentencePiece pieces: the text of the word that each piece completes, or the piece's id."""
    mark, special = "\u2581", ("<s>", "<pad>", "</s>", "<unk>")
    known = {word[1:] for word in words if word.startswith(mark)}
    keys, text, after_special = [], "", True
    for token in sequence:
        piece = symbols[token]
        if piece.startswith(mark) or piece in special or after_special:
            text = ""
        text += piece.removeprefix(mark)
        after_special = piece in special
        keys.append(text if text in known else token)
    return keys


def greedy_rows(counts, num_experts, columns, order=None, loads=None):
    """Keys by descending count (or in an order), each to its K experts with the smallest load, then fewest keys."""
    load, keys = list(loads or [0] * num_experts), [0] * num_experts
    rows = [None] * len(counts)
    for key in order or sorted(range(len(counts)), key=lambda h: -counts[h]):
        rows[key] = sorted(range(num_experts), key=lambda e: (load[e], keys[e], e))[:columns]
        for e in rows[key]:
            load[e] += counts[key]
            keys[e] += 1
    return rows


def dispersed_rows(clusters, counts, num_experts, columns):
    """Hash Layers: keys by descending count to the experts with the fewest keys of their cluster, then least load."""
    load, rows = [0] * num_experts, [None] * len(counts)
    of_cluster = {cluster: [0] * num_experts for cluster in clusters}
    for key in sorted(range(len(counts)), key=lambda h: -counts[h]):
        keys = of_cluster[clusters[key]]
        rows[key] = sorted(sorted(range(num_experts), key=lambda e: (keys[e], load[e], e))[:columns])
        for e in rows[key]:
            load[e] += counts[key]
            keys[e] += 1
    return rows


def loads_of(rows, counts, num_experts):
    """The load of each expert: the counts of the rows that name it."""
    load = [0] * num_experts
    for row, count in zip(rows, counts, strict=True):
        for e in row:
            load[e] += count
    return load


def smallest_largest_load(counts, num_experts, choices, loads=None):
    """The best that any table can do, by trying each: `choices` are the rows that a key can have."""
    from itertools import product

    start = loads or [0] * num_experts
    tables = product(choices, repeat=len(counts))
    return min(max(map(sum, zip(start, loads_of(rows, counts, num_experts), strict=True))) for rows in tables)


def spread_use(text, base_rows, heavy, num_experts, columns, padding):
    """A spread table of a text, walking it token by token. Returns the pairs' rows and every expert's load."""
    uses, fixed = {}, [0] * num_experts
    for place, token in enumerate(text):
        if token in heavy:
            pair = token, text[place - 1] if place else padding
            uses[pair] = uses.get(pair, 0) + 1
        else:
            for e in base_rows[token]:
                fixed[e] += 1
    pairs = sorted(uses)
    rows = greedy_rows([uses[pair] for pair in pairs], num_experts, columns, loads=fixed)
    added = loads_of(rows, [uses[pair] for pair in pairs], num_experts)
    return dict(zip(pairs, rows, strict=True)), [a + b for a, b in zip(fixed, added, strict=True)]


def memory_rows(sequence, orders, heads, rows, symbols, seeds, padding):
    """The rows of each token of a sequence without padding, counted through all heads, by their definition."""
    found = []
    for place in range(len(sequence)):
        of_token, first = [], 0
        for number, seed in enumerate(seeds):
            order = orders[number // heads]
            state = 0
            for other in range(place - order + 1, place + 1):
                state = splitmix64(state ^ (sequence[other] if other >= 0 else padding))
            hashed = (splitmix64(state ^ (seed % 2**64)) & (2**63 - 1)) % rows
            of_token.append(first + (sequence[place] if order == 1 else hashed))
            first += symbols if order == 1 else rows
        found.append(of_token)
    return found


def memory(x_D, rows, table_Nw, key, value, gain):
    """Engram (arXiv 2601.07372): what the rows of one token add to its activation."""
    looked_up = torch.cat([table_Nw[row] for row in rows])
    key_D, value_D = key @ looked_up, value @ looked_up

    def rms_norm(v_D):
        return v_D / torch.sqrt((v_D * v_D).mean())

    score = (rms_norm(x_D) * gain) @ rms_norm(key_D) / math.sqrt(len(x_D))
    return torch.sigmoid(score) * value_D
