"""`fairseq-hash tables from-router`: the most frequent experts of each token, beside naive counts of routes."""

from collections import Counter

import numpy as np
import pytest
import torch
from called import call, refused, shown
from made_tables import done, stream_of
from plugin import build
from small_models import checkpoint, loaded

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import load_table
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.table_tools.distilled import distilled_experts, share_of_choices


def naive(chosen_VE, count_V, columns):
    """By hand: the most frequent experts, then for tokens that lack some the emptiest other ones."""
    num_experts = len(chosen_VE[0])
    rows, load = [], [0] * num_experts
    for chosen, count in zip(chosen_VE, count_V, strict=True):
        row = sorted((e for e in range(num_experts) if chosen[e]), key=lambda e, c=chosen: (-c[e], e))[:columns]
        rows.append(row)
        for expert in row:
            load[expert] += max(count, 1)
    for token in sorted(range(len(rows)), key=lambda v: -max(count_V[v], 1)):
        others = sorted((e for e in range(num_experts) if e not in rows[token]), key=lambda e: (load[e], e))
        added = others[: columns - len(rows[token])]
        rows[token] += added
        for expert in added:
            load[expert] += max(count_V[token], 1)
    return rows


@pytest.mark.parametrize("columns", [1, 3])
def test_any_counts_by_hand(columns):
    generator = np.random.default_rng(columns)
    chosen_VE = generator.integers(0, 9, (200, 5)) * generator.integers(0, 2, (200, 5))
    chosen_VE[::3] = 0
    count_V = chosen_VE.sum(axis=1)
    expert_VK = distilled_experts(chosen_VE, count_V, columns)
    assert expert_VK.tolist() == naive(chosen_VE.tolist(), count_V.tolist(), columns)
    chosen = sum(chosen_VE[token, expert] for token, row in enumerate(expert_VK) for expert in row)
    assert share_of_choices(chosen_VE, expert_VK) == pytest.approx(chosen / chosen_VE.sum())
    assert share_of_choices(chosen_VE, distilled_experts(chosen_VE, count_V, 5)) == 1
    with pytest.raises(UserError, match="6 distinct experts per token of 5 experts"):
        distilled_experts(chosen_VE, count_V, 6)


def test_the_table_of_a_trained_router(data, tmp_path):
    """Counted again from the routes of each sample; a hash layer takes it, and one of another dictionary does not."""
    path, model = checkpoint(data, "mixed"), loaded(data, "mixed")
    source = data.parent / "valid.txt"
    symbols, _ = read_dictionary(data / "dict.txt")
    out = done("from-router", path, "--text", source, "--tokens-per-sample", 9, "--out", tmp_path / "t")
    read = torch.tensor([model.start, *stream_of(source, symbols)])
    uses = Counter()
    for at in range(0, len(read), 9):
        routes = model.routes_read(read[at : at + 9])
        uses.update(routes[routes["layer"] == 1].value_counts(["token", "expert"]).to_dict())
    chosen_VE = [[uses[symbol, expert] for expert in range(4)] for symbol in symbols]
    table = load_table(tmp_path / "t")
    assert table.expert_HK.tolist() == naive(chosen_VE, [sum(row) for row in chosen_VE], 1)
    assert (table.record.builder, table.record.settings["layer"]) == ("distilled", 1)
    share = sum(max(row) for row in chosen_VE) / len(read)
    assert f"the table has {share:.1%} of the router's choices on this text" in out
    unseen = sum(not any(row) for row in chosen_VE)
    assert unseen and f"note: {unseen} of {len(symbols)} symbols do not occur" in out
    assert shown(out)["builder"].startswith("distilled")
    # Binarized, and with two experts a token.
    text = ("--text", data, "--subset", "valid", "--tokens-per-sample", 9, "--experts-per-token", 2)
    done("from-router", path, *text, "--layer", 1, "--out", tmp_path / "two")
    assert load_table(tmp_path / "two").expert_HK.tolist() == naive(chosen_VE, [sum(row) for row in chosen_VE], 2)

    hash_layer = ("--router", "hash", "--sparse-layers", "1", "--num-experts", "4", "--hash-table", tmp_path / "t")
    _, _, trained, _ = build(data, *hash_layer)
    assert torch.equal(trained.decoder.hash_tables[0].expert, torch.from_numpy(table.expert_HK))
    other = tmp_path / "other"
    other.mkdir()
    lines = (data / "dict.txt").read_text().splitlines()
    (other / "dict.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(SystemExit, match="was built for another dictionary; build it from the dict.txt of this data"):
        build(other, *hash_layer)
    assert "was built for another dictionary than" in refused("tables", "show", tmp_path / "t", other / "dict.txt")


def test_refusals(data, tmp_path):
    """Before the text is read: which layer, how many experts, which samples; and models without routers."""

    def message(name, *more):
        words = ("--text", data.parent / "valid.txt", "--out", tmp_path / "o", *more)
        return refused("tables", "from-router", checkpoint(data, name), *words)

    assert "the model's layers with a router are 0 (switch), 1 (switch); give one by --layer" in message("switch")
    assert "--layer 0 has no router; the model's layers with a router are 1 (switch)" in message("mixed", "--layer", 0)
    assert "the model's layers with a router are none" in message("hash")
    assert "has no experts; give a checkpoint of a model with a router" in message("none")
    assert "5 distinct experts per token of 4 experts" in message("mixed", "--experts-per-token", 5)
    assert "--experts-per-token 0 is out of range" in message("mixed", "--experts-per-token", 0)
    assert "--tokens-per-sample 0 is out of range" in message("mixed", "--tokens-per-sample", 0)
    assert "does not exist" in message("mixed", "--text", tmp_path / "none")
    assert call("tables", "from-router", tmp_path / "none", "--text", "x", "--out", tmp_path / "o")[0] == 1
    assert not (tmp_path / "o").exists()
