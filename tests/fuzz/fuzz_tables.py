"""Readers of hash tables, dictionaries and binarized data."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from unittest import mock

from fuzz_formats import DEPTH, INDEX, index_tree, json_tree, npy_tree, safetensors_tree
from fuzz_mutations import Seed
from fuzz_rounds import Reader
from fuzz_seeds import SPLITS, kept, symbols

from data_prep.binarize import count_symbols
from data_prep.cut import cut
from data_prep.options import check_like
from fairseq_hash.hashing import TableShape, build_table, load_table, save_table
from fairseq_hash.hashing.build import check_shape
from fairseq_hash.hashing.dictionary import read_counts, read_dictionary, read_vocabulary
from fairseq_hash.hashing.features import Feature
from fairseq_hash.hashing.table import check_rows
from fairseq_hash.lm.table_buffers import TableBuffers
from fairseq_hash.provenance import corpus_of
from fairseq_hash.table_tools.tid2eid import check_exportable, import_table, is_foreign, read_tensors, write_tensor
from fairseq_hash.table_tools.token_streams import open_text

SHAPES = {
    "balanced": TableShape(4),
    "random": TableShape(4, 2, feature=Feature("bigram"), num_keys=32),
    "scattered": TableShape(4, 2, is_multi_hash=True),
    "modulo": TableShape(8, feature=Feature("ngram", 3), num_keys=16),
}


def _tables() -> list:
    counts = list(range(len(symbols()), 0, -1))
    return [build_table(name, symbols(), counts, shape, 1) for name, shape in SHAPES.items()]


def _saved(write: object, *arguments: object, name: str = "table") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(*arguments, path)
        return path.read_bytes()


def table_seeds() -> list[Seed]:
    """Return tables of several features."""
    files = [_saved(save_table, table) for table in _tables()]
    return [{"t.table": safetensors_tree(content)} for content in files] + [{"t.table": files[0]}]


def table_hostile() -> list[Seed]:
    """Return tables whose record is nested, or names what no table has."""
    tree = safetensors_tree(_saved(save_table, _tables()[0]))
    metadata = tree.value["header"]["__metadata__"]
    files = []
    for record in ("[" * DEPTH, {**metadata["record"], "num_experts": 1e308}, {**metadata["record"], "feature": []}):
        header = {**tree.value["header"], "__metadata__": {**metadata, "record": record}}
        files.append({"t.table": tree.dump({**tree.value, "header": header})})
    return files


def read_table(folder: Path) -> None:
    """Load a table, and do with it what a model and the command do before they use its experts."""
    table = load_table(folder / "t.table")
    table.fingerprint  # noqa: B018
    json.dumps(asdict(table.record))
    check_rows(table, len(symbols()))
    for shape in SHAPES.values():
        own = shape.num_experts, shape.feature, shape.columns, shape.is_multi_hash
        if own == (table.record.num_experts, table.feature, table.expert_HK.shape[1], table.record.is_multi_hash):
            check_shape(table, shape, symbols(), "t.table")
            TableBuffers(table).fingerprint  # noqa: B018


def foreign_seeds() -> list[Seed]:
    """Return tables of other frameworks: in safetensors, of several layers, and in NumPy's format."""
    table = _tables()[0]
    expert_VK = table.expert_HK
    safe = safetensors_tree(_saved(write_tensor, expert_VK, table.record, name="t.safetensors"))
    wide, narrow = (npy_tree(kind, expert_VK.shape, expert_VK.astype(kind).tobytes()) for kind in ("<i8", "<i4"))
    plain = _saved(write_tensor, expert_VK, table.record, name="t.npy")
    return [{"t.safetensors": safe}, {"t.npy": wide}, {"t.npy": narrow}, {"t.npy": plain}]


def foreign_hostile() -> list[Seed]:
    """Return NumPy files that hold objects, and that say to be larger than any memory."""
    pickled = npy_tree("|O", (1,), b"cos\nsystem\n(S'true'\ntR.")
    large = npy_tree("<i8", (2**40, 1), b"\0" * 8)
    return [{"t.npy": pickled.dump(pickled.value)}, {"t.npy": large.dump(large.value)}]


def read_foreign(folder: Path) -> None:
    """Read a table of another framework and import it."""
    (path,) = folder.iterdir()
    is_foreign(path)
    tables, stated = read_tensors(path, None)
    for name, expert_VK in tables.items():
        table, _ = import_table(expert_VK, name, symbols(), stated or 4)
        check_exportable(table, name)


def dictionary_seeds() -> list[Seed]:
    """Return dictionaries, counts and vocabularies."""
    text = kept()["data/dict.txt"]
    words = b"\n".join(line.rpartition(b" ")[0] for line in text.splitlines())
    pieces = b"".join(b"%s\t-%d.5\n" % (word, rank) for rank, word in enumerate(words.splitlines()))
    overwritten = text + text.splitlines()[0] + b" #fairseq:overwrite\n"
    return [
        {"dict.txt": text, "counts": text, "vocabulary": words},
        {"dict.txt": overwritten, "counts": text.replace(b" ", b"\t"), "vocabulary": pieces},
    ]


def read_dictionaries(folder: Path) -> None:
    """Read what a folder has."""
    known, _ = read_dictionary(folder / "dict.txt")
    read_counts(folder / "counts", known)
    read_vocabulary(folder / "vocabulary")


def stream_seeds() -> list[Seed]:
    """Return folders of data: binarized, with their index as values and as bytes, and with text."""
    data = {
        name: kept()[f"data/{name}"] for name in ("dict.txt", *(f"{s}.{e}" for s in SPLITS for e in ("bin", "idx")))
    }
    record = json_tree({"identity": {"corpus": "text", "words": True}})
    trees: Seed = {**data, **{f"{split}.idx": index_tree(data[f"{split}.idx"]) for split in SPLITS}}
    text = " ".join(symbols()[4:20]).encode() + b"\n"
    return [data, {**trees, "provenance.json": record}, {**data, "text": text * 30, "provenance.json": record}]


def stream_hostile() -> list[Seed]:
    """Return data whose index says to have more lines than any file, and a record that is nested."""
    data = {name.partition("/")[2]: content for name, content in kept().items() if name.startswith("data/")}
    files = []
    for lines in (2**20, 2**40, 2**63, 2**64 - 1):
        index = data["train.idx"]
        magic, version, code, _ = INDEX.unpack_from(index)
        files.append({**data, "train.idx": INDEX.pack(magic, version, code, lines) + index[INDEX.size :]})
    return files


def read_streams(folder: Path) -> None:
    """Read binarized data and text block by block, and cut the data."""
    known, _ = read_dictionary(folder / "dict.txt")
    for split in SPLITS:
        for _ in open_text(folder, split, known).blocks():
            pass
        count_symbols(folder / split, len(known))
    if (folder / "text").is_file():
        for _ in open_text(folder / "text", "train", known).blocks():
            pass
    if (folder / "provenance.json").is_file():
        corpus_of(folder)
        check_like(folder, words=True)
    with mock.patch("data_prep.cut.provenance", dict):  # which asks git
        cut(folder, folder / "cut", {"train": 100, "valid": 20, "test": None})


READERS = (
    Reader("hash table", table_seeds, read_table, table_hostile),
    Reader("table of another framework", foreign_seeds, read_foreign, foreign_hostile),
    Reader("dictionary, counts, vocabulary", dictionary_seeds, read_dictionaries),
    Reader("binarized data", stream_seeds, read_streams, stream_hostile),
)
