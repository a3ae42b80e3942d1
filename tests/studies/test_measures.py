"""Breakdowns of scores beside naive loops, and bytes beside the size of the text that was prepared."""

import random
from collections import defaultdict

import numpy as np
import pytest
from fairseq.data import Dictionary, TokenBlockDataset, data_utils
from one_process import one_process
from prepared import SPLITS, arguments, write_text

from data_prep.cli import main
from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.studies import measures
from fairseq_hash.table_tools.token_streams import open_text


def naive_sums(nats, groups):
    """Sum and number of each group."""
    found = defaultdict(lambda: [0.0, 0])
    for value, group in zip(nats.tolist(), groups, strict=True):
        found[group][0] += value
        found[group][1] += 1
    return dict(found)


def same(found, expected):
    sums, tokens = found
    assert sums.dtype == np.float64 and tokens.dtype == np.int64 and sums.shape == tokens.shape
    wanted = [expected.get(group, [0.0, 0]) for group in range(len(sums))]
    assert max(expected) < len(sums) and tokens.tolist() == [number for _, number in wanted]
    assert sums == pytest.approx(np.array([total for total, _ in wanted]), rel=1e-12)


def test_documents_are_those_of_the_lines():
    """Random lines, of which many are empty, also several in a row, at the beginning and at the end."""
    for seed in range(40):
        generator = random.Random(seed)
        lines = [[4] * generator.randint(1, 3) if generator.random() < 0.6 else [] for _ in range(150)]
        stream, expected, number, after_empty = [], [], 0, False
        for line in lines:
            if line and after_empty and any(token != 2 for token in stream):
                number += 1
            after_empty = not line
            stream += [*line, 2]
            expected += [number] * (len(line) + 1)
        document_S, what = measures.documents(np.array(stream))
        assert (document_S.tolist(), what) == (expected, "documents") and document_S.dtype == np.int64
        nats_S = np.random.default_rng(seed).random(len(stream), dtype=np.float32)
        same(measures.by_document(nats_S, document_S), naive_sums(nats_S, expected))


def test_a_text_of_few_documents_is_cut():
    for count, what in ((19, "passages of 1,024 tokens"), (20, "documents")):
        stream = np.array([*[5, 5, 5, 2, 2] * (count - 1), *[6] * 3000, 2])
        document_S, found = measures.documents(stream)
        assert found == what and document_S.dtype == np.int64
        if count == 19:
            assert document_S.tolist() == [place // 1024 for place in range(len(stream))]


@pytest.mark.parametrize("length", [1, 16, 25, 10_000])
def test_positions_are_those_of_fairseq_s_samples(data, length):
    """Of the targets; the last sample is shorter, and its tokens are all there."""
    symbols = Dictionary.load(str(data / "dict.txt"))
    lines = data_utils.load_indexed_dataset(str(data / "test"), symbols)
    cut = {"pad": 1, "eos": 2, "break_mode": "none", "include_targets": True}
    blocks = TokenBlockDataset(lines, lines.sizes, length, **cut)
    places = [place for number in range(len(blocks)) for place in range(len(blocks[number][1]))]
    nats_S = np.random.default_rng(0).random(len(places))
    found = measures.by_position(nats_S, length)
    assert len(found[0]) == length
    same(found, naive_sums(nats_S, places))


def test_frequencies():
    """Decades, from counts at their edges; random tokens."""
    count_V = np.array([0, 0, 1234, 1, 9, 10, 99, 100, 999, 1000, 0, 57])
    edges, names = measures.frequency_edges(count_V)
    assert edges.tolist() == [0, 1, 10, 100, 1000]
    assert names == ["0", "1-9", "10-99", "100-999", "1,000-9,999"]
    assert measures.frequency_edges(np.array([0, 0]))[1] == ["0", "1-9"]
    assert measures.frequency_edges(np.array([10]))[1] == ["0", "1-9", "10-99"]
    generator = np.random.default_rng(0)
    id_S, nats_S = generator.integers(0, 12, 500), generator.random(500)
    groups = [len(str(count_V[token])) if count_V[token] else 0 for token in id_S]
    same(measures.by_frequency(nats_S, id_S, count_V, edges), naive_sums(nats_S, groups))


def test_scores_of_another_text_are_refused():
    with pytest.raises(UserError, match="3 scores for 4 tokens; give the scores of the same text"):
        measures.by_document(np.ones(3), np.zeros(4, dtype=np.int64))
    with pytest.raises(UserError, match="5 scores for 4 tokens"):
        measures.by_frequency(np.ones(5), np.full(4, 2), np.ones(9), np.array([0, 1]))


def test_bytes_of_symbols():
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = ["▁", "▁the", "ing", "ß", "▁日本", "<0x0A>", "<0xFF>", "<0x1>", "madeupword0000"]
    assert measures.bytes_of_symbols([*special, *pieces]).tolist() == [0, 0, 1, 0, 1, 4, 3, 2, 7, 1, 1, 5, 0]
    words = ["the", "naïve", "<0x0A>", "<s>x", "madeupword0001", "madeupwords"]
    assert measures.bytes_of_symbols([*special, *words]).tolist() == [0, 0, 1, 0, 4, 7, 7, 5, 0, 12]
    # Of words, `<unk>` is neither counted nor is the space before it, also at the beginning of a line.
    assert measures.bytes_of_stream(np.array([4, 4, 2, 3, 4, 2, 2]), [*special, *words]) == (8 + 5 + 1, 1)


@pytest.mark.parametrize("options", [("--vocab-size", "310"), ("--words",)], ids=["pieces", "words"])
def test_bytes_are_those_of_the_file(tmp_path, options):
    """Of a text with blank lines, accents, and characters that only `train` lacks and that fall back to bytes."""
    files = write_text(tmp_path / "text")
    if "--words" not in options:
        for split, more in (("train", "a naïve café"), ("valid", "日本 x 語x"), ("test", "日")):
            with files[split][0].open("a", encoding="utf-8") as file:
                file.write(f"\n\n{more}\n" * 3)
    with one_process():
        assert main(arguments(files, tmp_path / "data", *options)) == 0
    symbols, _ = read_dictionary(tmp_path / "data" / "dict.txt")
    assert measures.are_pieces(symbols) == ("--words" not in options)
    for split in SPLITS:
        id_S = np.concatenate(list(open_text(tmp_path / "data", split, symbols).blocks()))
        assert measures.bytes_of_stream(id_S, symbols) == (files[split][0].stat().st_size, 0)
