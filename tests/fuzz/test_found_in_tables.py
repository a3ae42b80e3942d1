"""What fuzzing has found in readers of tables and data.

Each input is the smallest that showed a traceback, or took too long or too much memory. Now it ends in one line.
"""

import json
import struct

import pytest
from fuzz_formats import INDEX, safetensors_tree
from fuzz_found import DEEP, refused, written
from fuzz_seeds import kept, symbols
from fuzz_tables import table_seeds

from fairseq_hash.hashing import load_table
from fairseq_hash.table_tools.tid2eid import read_tensors
from fairseq_hash.table_tools.token_streams import open_text


def spoilt_table(folder, **entries):
    tree = table_seeds()[0]["t.table"]
    header = json.loads(json.dumps(tree.value["header"]))
    header["__metadata__"]["record"] |= entries
    return written(folder / "t.table", tree.dump({**tree.value, "header": header}))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("num_experts", 1e308),
        ("num_experts", "4"),
        ("num_experts", True),
        ("feature", []),
        ("seed", "x"),
        ("length", -0.5),
    ],
)
def test_a_table_whose_record_has_another_kind_of_value(tmp_path, entry, value):
    assert f"damaged record (its {entry})" in refused(load_table, spoilt_table(tmp_path, **{entry: value}))


def test_a_table_of_more_experts_than_entries(tmp_path):
    assert "more than the" in refused(load_table, spoilt_table(tmp_path, num_experts=10**9))


@pytest.mark.parametrize("record", [DEEP, '{"seed": ' + "9" * 5000 + "}", "[]"])
def test_a_table_whose_record_is_nested_or_has_a_number_of_5000_digits(tmp_path, record):
    tree = table_seeds()[0]["t.table"]
    metadata = {**tree.value["header"]["__metadata__"], "record": record}
    path = written(
        tmp_path / "t", tree.dump({**tree.value, "header": {**tree.value["header"], "__metadata__": metadata}})
    )
    assert "damaged or no table file" in refused(load_table, path)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776, 1)}",  # 8 TiB in a file of 200 bytes
        "{'descr': '<i8', 'fortran_order': False, 'shape': (((",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "(" * 5000,
    ],
)
def test_a_numpy_file_with_another_header(tmp_path, header):
    text = header.encode()
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(8)
    assert "damaged or no .npy file" in refused(read_tensors, written(tmp_path / "t.npy", content), None)


def test_a_tensor_whose_number_of_experts_has_5000_digits(tmp_path):
    tree = safetensors_tree(table_seeds()[0]["t.table"].dump(table_seeds()[0]["t.table"].value))
    header = {"tid2eid": tree.value["header"]["expert"], "__metadata__": {"num_experts": "9" * 5000}}
    _, stated = read_tensors(written(tmp_path / "t", tree.dump({**tree.value, "header": header})), None)
    assert stated is None


@pytest.mark.parametrize("lines", [2**20, 2**40, 2**63, 2**64 - 1])
def test_an_index_of_more_lines_than_it_holds(tmp_path, lines):
    """Memory for all lines was asked for before the file ended."""
    index = kept()["data/train.idx"]
    magic, version, code, _ = INDEX.unpack_from(index)
    written(tmp_path / "train.bin", kept()["data/train.bin"])
    written(tmp_path / "train.idx", INDEX.pack(magic, version, code, lines) + index[INDEX.size :])
    assert f"{lines:,} lines" in refused(open_text, tmp_path, "train", symbols())


def test_an_index_that_lacks_its_end_or_has_a_negative_length(tmp_path):
    index = bytearray(kept()["data/train.idx"])
    written(tmp_path / "train.bin", kept()["data/train.bin"])
    written(tmp_path / "train.idx", bytes(index[:-8]))
    assert "its size differs from that in train.idx" in refused(open_text, tmp_path, "train", symbols())
    first, second = struct.unpack_from("<2i", index, INDEX.size)
    struct.pack_into("<2i", index, INDEX.size, -5, first + second + 5)
    written(tmp_path / "train.idx", bytes(index))
    assert "is damaged" in refused(open_text, tmp_path, "train", symbols())
