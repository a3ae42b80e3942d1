"""Hash features and tables on a device: the rows are those of the CPU and of the naive loop, to the last bit."""

import numpy as np
import pytest
import reference
import torch

from fairseq_hash.hashing import Feature, HashTable, TableShape, build_table
from fairseq_hash.hashing.lookup import lookup_rows, mix_tensor
from fairseq_hash.hashing.words import polynomial_hash, word_index
from fairseq_hash.lm.table_buffers import TableBuffers

PAD, KEYS = 1, 97
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "▁un", "do", "ne", "▁do", "▁", "n", "e", "▁undo"]
SYMBOLS += [f"{'▁' if place % 3 == 0 else ''}{'abcde'[place % 5]}" for place in range(30)]
WORDS = ["▁undone", "▁done", "▁undo", "▁do", "done", "▁n", "▁elsewhere", "▁ab", "▁dea", "▁cd"]
FEATURES = {name: Feature(name) for name in ("token", "previous", "bigram", "position", "future", "word")}
FEATURES |= {"ngram 2": Feature("ngram", 2), "ngram 5": Feature("ngram", 5)}
FEATURES |= {"history 1": Feature("history", 1), "history 3": Feature("history", 3), "spread": Feature("token")}


def index_of(name):
    """What words or pairs of heavy tokens need; every third token is heavy, with half of all tokens before it."""
    if name == "word":
        return word_index(SYMBOLS, WORDS)
    if name == "spread":
        heavy = np.arange(len(SYMBOLS)) % 3 == 0
        pair = np.flatnonzero(heavy)[:, None] * len(SYMBOLS) + np.arange(0, len(SYMBOLS), 2)
        return {"heavy": heavy, "pair": pair.ravel()}
    return {}


def tokens_with_padding():
    """Sentences with padding behind them, before them, around them, and without."""
    token_BL = torch.randint(2, len(SYMBOLS), (9, 40), generator=torch.Generator().manual_seed(4))
    token_BL[0, 25:] = PAD
    token_BL[1, :10] = PAD
    token_BL[2, :5] = PAD
    token_BL[2, 30:] = PAD
    token_BL[3, 1:] = PAD
    return token_BL


def rows_on(device, name, token_BL):
    index = {key: torch.from_numpy(value).to(device) for key, value in index_of(name).items()}
    row_BL = lookup_rows(FEATURES[name], token_BL.to(device), PAD, KEYS, index)
    assert row_BL.device.type == device.type and row_BL.dtype == torch.int64
    return row_BL.cpu()


@pytest.mark.parametrize("name", FEATURES)
def test_rows_are_those_of_the_cpu(name, device):
    token_BL = tokens_with_padding()
    assert torch.equal(rows_on(device, name, token_BL), rows_on(torch.device("cpu"), name, token_BL))


@pytest.mark.parametrize("name", FEATURES)
def test_rows_equal_the_naive_loop(name, device):
    """Each sentence by itself, as if there were no padding."""
    token_BL = tokens_with_padding()
    row_BL = rows_on(device, name, token_BL)
    for token_L, row_L in zip(token_BL, row_BL, strict=True):
        real = token_L != PAD
        sequence, rows = token_L[real].tolist(), row_L[real].tolist()
        if name == "word":
            known = index_of(name)["word_hash"].tolist()
            keys = reference.word_keys(sequence, SYMBOLS, WORDS)
            expected = [
                key if isinstance(key, int) else len(SYMBOLS) + known.index(polynomial_hash(key)[0]) for key in keys
            ]
        elif name == "spread":
            pairs = {pair: len(SYMBOLS) + place for place, pair in enumerate(index_of(name)["pair"].tolist())}
            before = [PAD, *sequence]
            expected = [
                pairs.get(token * len(SYMBOLS) + last, last) if token % 3 == 0 else token
                for last, token in zip(before, sequence, strict=False)
            ]
        else:
            feature = FEATURES[name]
            expected = reference.feature_rows(sequence, feature.name, feature.length, PAD, KEYS)
        assert rows == expected


@pytest.mark.parametrize("name", [name for name, feature in FEATURES.items() if not feature.is_oracle])
def test_rows_step_by_step(name, device):
    """A prefix has the rows that it has in the whole, beside padding too."""
    token_BL = tokens_with_padding()
    whole_BL = rows_on(device, name, token_BL)
    for length in range(1, token_BL.shape[1] + 1):
        last_B = rows_on(device, name, token_BL[:, :length])[:, -1]
        real = token_BL[:, length - 1] != PAD
        assert torch.equal(last_B[real], whole_BL[real, length - 1])


def test_mixed_bits(device):
    """SplitMix64 wraps alike on every device."""
    keys = torch.cat([torch.arange(-50, 50), torch.tensor([2**63 - 1, -(2**63), 2**62])])
    expected = [reference.splitmix64(key % 2**64) for key in keys.tolist()]
    assert [key % 2**64 for key in mix_tensor(keys.to(device)).tolist()] == expected


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("columns", [1, 3])
def test_tables_name_the_experts_of_the_cpu(name, columns, device):
    """Through the module that holds a table, whose fingerprint is the same wherever it lies."""
    feature, index = FEATURES[name], index_of(name)
    more = len(index.get("pair", index.get("word_hash", [])))
    keys = KEYS if feature.name in ("bigram", "ngram", "history", "position") else len(SYMBOLS)
    shape = TableShape(4, columns, feature=feature, num_keys=keys)
    counts = [len(SYMBOLS) - place for place in range(len(SYMBOLS))]
    if index:  # the rows of words and pairs stand behind those of the tokens
        base = build_table("random", SYMBOLS, counts, TableShape(4, columns), 3)
        rest_HK = np.random.default_rng(1).random((more, 4)).argsort(axis=1)[:, :columns]
        record = type(base.record)(**{**vars(base.record), "feature": feature.name})
        table = HashTable(np.concatenate([base.expert_HK, rest_HK]), record, index)
    else:
        table = build_table("random", SYMBOLS, counts, shape, 3)
    token_BL = tokens_with_padding()
    found = []
    for place in (torch.device("cpu"), device):
        buffers = TableBuffers(table).to(place)
        row_BL = buffers.rows(token_BL.to(place), PAD, None)
        real_BL = (token_BL != PAD).to(place)
        found.append((buffers(row_BL[real_BL]).cpu(), buffers.fingerprint))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] == table.fingerprint
