"""What tests of tables share: calls, naive recounts, and what was written."""

import json
import math
import statistics

import pytest
import torch
from called import call

from fairseq_hash.hashing.dictionary import PADDING
from fairseq_hash.hashing.lookup import lookup_rows, tensors

FILES = ["balance.csv", "balance.json", "loads.png", "index.html"]


def done(*arguments):
    """Return what a call prints that succeeds."""
    status, out, err = call("tables", *arguments)
    assert (status, err) == (0, ""), err
    return out


def lines_of(path, symbols):
    """The token ids of a file of symbols, line by line, as fairseq-preprocess has them."""
    index = {symbol: number for number, symbol in enumerate(symbols)}
    return [[*(index.get(word, 3) for word in line.split()), 2] for line in path.read_text().splitlines()]


def stream_of(path, symbols):
    return sum(lines_of(path, symbols), [])


def naive_loads(rows, counts, num_experts):
    load = [0] * num_experts
    for experts, count in zip(rows, counts, strict=True):
        for expert in experts:
            load[expert] += count
    return load


def judged(folder):
    """What balance.json says of each table and of what it was judged on."""
    tables = json.loads((folder / "balance.json").read_text())["tables"]
    return [{one["counts"]: one for one in table["judged"]} for table in tables]


def assert_figures(one, load, counts):
    """1e-12: sums of doubles in another order."""
    mean = statistics.fmean(load)
    assert one["loads"] == load and one["tokens"] == sum(counts)
    expected = {
        "largest_over_mean": max(load) / mean,
        "smallest_over_mean": min(load) / mean,
        "coefficient_of_variation": statistics.pstdev(load) / mean,
        "entropy": -sum(share * math.log(share) for share in (value / sum(load) for value in load) if share),
    }
    for name, value in expected.items():
        assert one[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name
    heavy = sorted((count for count in counts if count > mean), reverse=True)
    assert [key["count"] for key in one["overloading"]] == heavy
    assert [key["over_mean"] for key in one["overloading"]] == pytest.approx([count / mean for count in heavy])
    assert one["bound_over_mean"] <= one["largest_over_mean"]


def embeddings(path, symbols, seed=0, **more):
    """A checkpoint that has nothing but embeddings."""
    weight = torch.randn(len(symbols), 6, generator=torch.Generator().manual_seed(seed))
    torch.save({"model": {"decoder.embed_tokens.weight": weight}, **more}, path)
    return path


def rows_of(table, token_BL):
    """The row of each token in a table, without a model."""
    return lookup_rows(table.feature, token_BL, PADDING, len(table.expert_HK), tensors(table.index))
