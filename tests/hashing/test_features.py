"""Features of tokens against a naive loop; prefixes, padding, and the same in torch and in NumPy."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import Feature
from fairseq_hash.hashing.lookup import lookup_rows, mix_tensor, tensors
from fairseq_hash.hashing.mixing import mix
from fairseq_hash.hashing.words import MOST_PIECES, polynomial_hash, word_index

PAD = 1
SYMBOLS = ["<s>", "<pad>", "</s>", "<unk>", "▁un", "do", "ne", "▁do", "▁", "n", "e", "▁undo"]
WORDS = ["▁undone", "▁done", "▁undo", "▁do", "done", "▁n", "▁elsewhere"]
FEATURES = [Feature(name) for name in ("token", "previous", "bigram", "position", "future", "word")]
FEATURES += [Feature("ngram", 3), Feature("history", 1), Feature("history", 3)]
CAUSAL = [feature for feature in FEATURES if not feature.is_oracle]
KEYS = 97


def index_of(feature):
    return tensors(word_index(SYMBOLS, WORDS)) if feature.name == "word" else {}


def rows(feature, token_BL):
    return lookup_rows(feature, token_BL, PAD, KEYS, index_of(feature))


sequences = st.lists(st.integers(2, len(SYMBOLS) - 1), min_size=1, max_size=12)


@pytest.mark.parametrize("feature", FEATURES, ids=str)
@settings(max_examples=40)  # of each feature
@given(sequence=sequences)
def test_rows_equal_the_naive_loop(feature, sequence):
    ours = rows(feature, torch.tensor([sequence]))[0].tolist()
    if feature.name == "word":
        word_hash = index_of(feature)["word_hash"].tolist()
        expected = reference.word_keys(sequence, SYMBOLS, WORDS)
        # A key is a word's text or a piece's id; the row of a word is the place of its hash.
        words = {key for key in expected if isinstance(key, str)}
        row = {word: len(SYMBOLS) + word_hash.index(polynomial_hash(word)[0]) for word in words}
        expected = [row.get(key, key) for key in expected]
    else:
        expected = reference.feature_rows(sequence, feature.name, feature.length, PAD, KEYS)
    assert ours == expected


@pytest.mark.parametrize("feature", FEATURES, ids=str)
@settings(max_examples=40)  # of each feature
@given(sequence=sequences, left=st.integers(0, 4), right=st.integers(0, 4))
def test_padding_changes_no_row(feature, sequence, left, right):
    """Before a sequence, as in generation, or behind it, as in a batch."""
    alone = rows(feature, torch.tensor([sequence]))[0].tolist()
    padded = rows(feature, torch.tensor([[PAD] * left + sequence + [PAD] * right]))[0].tolist()
    assert padded[left : left + len(sequence)] == alone


@pytest.mark.parametrize("feature", CAUSAL, ids=str)
@settings(max_examples=40)  # of each feature
@given(sequence=sequences)
def test_a_prefix_has_the_rows_of_the_whole(feature, sequence):
    whole = rows(feature, torch.tensor([sequence]))[0].tolist()
    for length in range(1, len(sequence) + 1):
        assert rows(feature, torch.tensor([sequence[:length]]))[0].tolist() == whole[:length]


def test_rows_of_a_batch_are_those_of_its_sequences():
    generator = torch.Generator().manual_seed(0)
    token_BL = torch.randint(2, len(SYMBOLS), (5, 9), generator=generator)
    for feature in FEATURES:
        together = rows(feature, token_BL)
        assert torch.equal(together, torch.cat([rows(feature, token_BL[i : i + 1]) for i in range(5)]))
        assert together.dtype == torch.int64 and together.min() >= 0


def test_predicted_rows_are_the_predictions():
    predicted_BL = torch.tensor([[3, 4, 5]])
    assert lookup_rows(Feature("predicted"), torch.tensor([[4, 5, 6]]), PAD, 9, {}, predicted_BL) is predicted_BL


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_mixing_is_the_same_in_torch_and_numpy(keys):
    keys = np.array(keys, dtype=np.uint64)
    assert mix_tensor(torch.from_numpy(keys.astype(np.int64))).numpy().astype(np.uint64).tolist() == mix(keys).tolist()
    assert mix(keys).tolist() == [reference.splitmix64(int(key)) for key in keys]


def test_buckets_are_uniform():
    """Chi-squared of all pairs of 250 tokens over 64 rows: mean 63, standard deviation 11.2; five of them are 119."""
    token = torch.arange(2, 252)
    pairs = torch.cartesian_prod(token, token)
    row = lookup_rows(Feature("bigram"), pairs, PAD, 64, {})[:, 1]
    counts = torch.bincount(row, minlength=64).double()
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 119


def test_words_of_subword_nmt():
    """Pieces that go on end in @@: a word begins behind one that does not."""
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "un@@", "do@@", "ne", "do", "ne@@"]
    words = ["undone", "done", "do", "unrelated"]
    index = tensors(word_index(symbols, words))
    row = {key: len(symbols) + place for place, key in enumerate(sorted(words, key=polynomial_hash))}
    for sequence, expected in (
        ([4, 5, 6], [4, 5, row["undone"]]),
        ([5, 6, 7], [row["do"], row["done"], row["do"]]),
        ([7, 6, 2, 6], [row["do"], 6, 2, 6]),
    ):
        assert lookup_rows(Feature("word"), torch.tensor([sequence]), PAD, 0, index)[0].tolist() == expected


def test_a_word_of_too_many_pieces_has_the_rows_of_its_pieces():
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "▁a", "a"]
    words = ["▁" + "a" * length for length in range(1, MOST_PIECES + 4)]
    index = tensors(word_index(symbols, words))
    row_L = lookup_rows(Feature("word"), torch.tensor([[4] + [5] * (MOST_PIECES + 2)]), PAD, 0, index)[0]
    assert (row_L[:MOST_PIECES] >= len(symbols)).all() and row_L[:MOST_PIECES].unique().numel() == MOST_PIECES
    assert row_L[MOST_PIECES:].tolist() == [5] * 3


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("tokens", 0, "--hash-feature tokens is unknown; use one of token, previous, "),
        ("token", 2, "--hash-length 2 goes with --hash-feature ngram or history; leave it out for token"),
        ("ngram", 0, "--hash-length 0 does not go with --hash-feature ngram; give 2 to 64 tokens"),
        ("ngram", 1, "give 2 to 64"),
        ("history", 0, "give 1 to 64"),
        ("history", 65, "give 1 to 64"),
    ],
)
def test_bad_features_are_refused(name, length, message):
    with pytest.raises(UserError) as error:
        Feature(name, length)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_dictionaries_without_words_are_refused():
    with pytest.raises(UserError, match="marks no words"):
        word_index(["<s>", "<pad>", "</s>", "<unk>", "a", "b"], WORDS)
    with pytest.raises(UserError, match="has no words"):
        word_index(SYMBOLS, ["<s>", "▁"])
