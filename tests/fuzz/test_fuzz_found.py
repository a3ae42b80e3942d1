"""What fuzzing has found, each as the smallest input that showed it: all of these ended in a traceback, or took too
long or too much memory, and are now refused in one line.
"""

import hashlib
import io
import itertools
import json
import lzma
import math
import struct
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from fairseq.data import Dictionary
from fuzz_formats import INDEX, pickle_with_command, safetensors_tree, torch_bytes, zip_tree
from fuzz_reports import read_logs, read_study, read_study_records
from fuzz_seeds import kept, run_files, symbols
from fuzz_tables import table_seeds
from fuzz_texts import ALONE, PACKED, TEXT, _large_dictionary
from made_runs import write_run

from data_prep.corpora import CORPORA, fetch_text
from data_prep.download import _remembered
from data_prep.options import check_like
from data_prep.text import read_lines
from fairseq_hash.api.loading import task_of
from fairseq_hash.checkpoint.hash_tables import tables_of
from fairseq_hash.checkpoint.inspection import facts
from fairseq_hash.checkpoint.loading import read_checkpoint
from fairseq_hash.checkpoint.mainfile import read_main
from fairseq_hash.checkpoint.manifest import Manifest
from fairseq_hash.checkpoint.sharded_tensor import open_shards
from fairseq_hash.checkpoint.shards import Shard, ShardFile
from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import load_table
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.reporting.benchmarks_files import load_benchmarks
from fairseq_hash.reporting.comparison_table import _mean, for_readers
from fairseq_hash.studies.definition import load_study
from fairseq_hash.table_tools.tid2eid import read_tensors
from fairseq_hash.table_tools.token_streams import open_text

DEEP = "[" * 50_000


def refused(read, *arguments):
    """Return the one line with which a reading ends."""
    with pytest.raises(UserError) as caught:
        read(*arguments)
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 2000
    return message


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


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


@pytest.mark.parametrize("content", ['["identity"]', '{"identity": "words"}', DEEP])
def test_a_record_of_data_that_is_no_object(tmp_path, content):
    written(tmp_path / "dict.txt", kept()["data/dict.txt"])
    written(tmp_path / "provenance.json", content)
    check_like(tmp_path, words=True)  # it does not say how the data was made


def shard_of(path, experts=2):
    content = path.read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    return Shard(path.name, "weights", 0, experts, len(content), hashlib.sha256(header).hexdigest())


def spoilt_shard(folder, change):
    (content, *_) = (one for name, one in run_files("hash").items() if "weights" in name)
    tree = safetensors_tree(content)
    header = json.loads(json.dumps(tree.value["header"]))
    change(header)
    return written(folder / "s.safetensors", tree.dump({**tree.value, "header": header}))


SPOILT = {
    "a tensor that is a word": lambda header: header.update({next(name for name in header if "fc1" in name): "nan"}),
    "no checksums": lambda header: header["__metadata__"]["about"].pop("rows_sha256"),
    "checksums of one tensor too few": lambda header: header["__metadata__"]["about"]["rows_sha256"].popitem(),
    "one checksum too few": lambda header: next(iter(header["__metadata__"]["about"]["rows_sha256"].values())).pop(),
    "nested": lambda header: header["__metadata__"].update(about=DEEP),
    "no metadata": lambda header: header.pop("__metadata__"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_shard_whose_header_is_damaged_and_meant(tmp_path, what):
    path = spoilt_shard(tmp_path, SPOILT[what])
    assert "is damaged" in refused(ShardFile, path, shard_of(path))


def test_a_shard_of_other_experts_than_the_manifest_says(tmp_path):
    path = spoilt_shard(tmp_path, lambda header: None)
    assert "for 4 experts" in refused(ShardFile, path, shard_of(path, 4))


def test_a_manifest_of_a_thousand_billion_experts(tmp_path):
    """Each of them was counted."""
    shard = {"file": "a", "part": "weights", "first": 0, "experts": 2**40, "bytes": 1, "header_sha256": ""}
    plain = {"format": 1, "save": "a", "update": 1, "num_experts": 4, "router": "hash", "dictionary_fingerprint": ""}
    manifest = Manifest.of({"fairseq_hash": {**plain, "table_fingerprint": None, "shards": [shard]}}, "a file")
    assert "hold experts 0 to 1099511627775, not 0 to 3" in refused(open_shards, tmp_path, manifest, "weights")


def test_a_manifest_with_other_kinds_within_its_lists():
    plain = {"format": 1, "save": "a", "update": 1, "num_experts": 4, "router": "hash", "dictionary_fingerprint": ""}
    plain |= {"table_fingerprint": None, "shards": []}
    for entry in (
        {"experts": [1]},
        {"numbers": {"a": "b"}},
        {"update": True},
        {"save": "\ud800"},
        {"provenance": {"a": torch.ones(1)}},
    ):
        assert "damaged manifest" in refused(Manifest.of, {"fairseq_hash": plain | entry}, "a file")


def main_with(folder, pickled):
    tree = zip_tree(torch_bytes({"model": {}}))
    (name,) = (name for name in tree.value if name.endswith("data.pkl"))
    return written(folder / "c.pt", tree.dump({**tree.value, name: pickled}))


@pytest.mark.parametrize("pickled", [b"\x80\x02a.", b"\x80\x02}(u.", b"\x80\x02]" * 9 + b"a.", b".", b"\x80\x02h\x01."])
def test_a_main_file_whose_pickle_is_damaged(tmp_path, pickled):
    """torch's reader raises IndexError, KeyError and others."""
    assert "c.pt is " in refused(read_main, main_with(tmp_path, pickled))


def test_a_main_file_runs_nothing(tmp_path):
    assert "would run code" in refused(read_main, main_with(tmp_path, pickle_with_command()))
    assert "torch did not write it" in refused(read_main, written(tmp_path / "c.pt", pickle_with_command()))


def test_a_main_file_that_names_what_a_terminal_would_obey(tmp_path):
    message = refused(read_main, main_with(tmp_path, b"\x80\x02ctorch\nFl\x00\x1b[31m\n."))
    assert "?" in message


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"model": {"w": 1}}, "its model"),
        ({"model": [torch.zeros(1)]}, "its model"),
        ({"model": None}, "its model"),
        ({"model": {}, "optimizer_history": {"a": 1}}, "its optimizer_history"),
        ({"model": {}, "optimizer_history": [1]}, "its optimizer_history"),
        ({"model": {}, "extra_state": 5}, "its extra_state"),
        ({"model": {}, "last_optimizer_state": [1]}, "its last_optimizer_state"),
        ({"model": {"w": torch.zeros(1).expand(2**40)}}, "is larger than the file"),  # 4 TiB in 4 bytes
    ],
)
def test_a_main_file_whose_entries_are_of_other_kinds(tmp_path, state, said):
    path = written(tmp_path / "c.pt", torch_bytes(state))
    assert said in refused(read_main, path)


def test_an_old_file_that_asks_for_memory(tmp_path):
    """Of before torch 1.6: memory for 68 billion numbers was asked for, and then their data was missing."""
    content = torch_bytes({"model": {"w": torch.zeros(4)}}, _use_new_zipfile_serialization=False)
    large = content.replace(b"K\x04Ntq", b"\x8a\x05\x00\x00\x00\x00\x10Ntq")
    assert large != content
    assert "68,719,476,736 elements" in refused(read_main, written(tmp_path / "c.pt", large))
    assert list(read_main(written(tmp_path / "c.pt", content))["model"]) == ["w"]


def test_an_old_file_with_a_length_of_two_billion(tmp_path):
    """A text in it said to be that long, and memory for it was asked for."""
    content = torch_bytes({"model": {"w": torch.zeros(4)}}, _use_new_zipfile_serialization=False)
    spoilt = content.replace(b"X\x05\x00\x00\x00model", b"X\xff\xff\xff\x7fmodel")
    assert spoilt != content
    assert "damaged or no checkpoint" in refused(read_main, written(tmp_path / "c.pt", spoilt))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("extra_state", {"train_iterator": 5}),
        ("extra_state", {"train_iterator": {"epoch": torch.zeros(1)}}),
        ("optimizer_history", [{"num_updates": torch.zeros(1), "optimizer_name": 5}]),
        ("cfg", {"model": {"router": ["x"], "decoder_embed_dim": torch.zeros(1)}}),
    ],
)
def test_what_a_checkpoint_does_not_say_is_not_known(tmp_path, entry, value):
    path = written(tmp_path / "c.pt", torch_bytes({"model": {"w": torch.zeros(1)}, entry: value}))
    found = json.loads(json.dumps(facts(path, read_checkpoint(path))))
    assert [found[name] for name in ("update", "epoch", "router", "model_width")] == [None] * 4


@pytest.mark.parametrize("cfg", [5, {"task": ["language_modeling"]}, {}])
def test_a_checkpoint_whose_task_is_no_group_of_options(cfg):
    assert "no cfg" in refused(task_of, {"cfg": cfg}, "a file")


def test_experts_that_are_no_matrices(tmp_path):
    path = written(tmp_path / "c.pt", torch_bytes({"model": {"decoder.layers.0.experts.fc1_weight": torch.zeros(())}}))
    assert facts(path, read_checkpoint(path))["experts"] == 0


@pytest.mark.parametrize(
    "option", [{"hash_feature": 5}, {"hash_length": "x"}, {"multi_hash": "2"}, {"num_experts": [4]}, {"digest": 1.5}]
)
def test_a_checkpoint_whose_table_has_options_of_another_kind(option):
    given = {"hash_feature": "token", "num_experts": 4} | option
    digest = torch.full((32,), given.pop("digest", 7), dtype=torch.float64 if "digest" in option else torch.uint8)
    model = {"decoder.hash_tables.0.expert": torch.zeros(4, 1, dtype=torch.int64)}
    model["decoder.hash_tables.0.dictionary_fingerprint"] = digest
    assert "hash table is damaged (its " in refused(tables_of, model, given, given["num_experts"])


def test_a_checkpoint_whose_options_fairseq_cannot_read(tmp_path):
    from fairseq import checkpoint_utils

    files = run_files("dense")
    state = torch.load(io.BytesIO(files["checkpoint_best.pt"]), weights_only=True)
    state["cfg"]["eval_lm"]["softmax_batch"] = "${x"
    path = written(tmp_path / "c.pt", torch_bytes(state))
    with pytest.raises(SystemExit, match="options that fairseq cannot read"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_an_optimizer_state_that_lacks_an_expert_s_parameter(tmp_path):
    files = run_files("hash")
    state = torch.load(io.BytesIO(files["checkpoint_best.pt"]), weights_only=True)
    for name, content in files.items():
        written(tmp_path / name, content)
    assert facts(tmp_path / "checkpoint_best.pt", read_checkpoint(tmp_path / "checkpoint_best.pt"))["experts"] == 4
    state["last_optimizer_state"]["state"] = {}
    written(tmp_path / "checkpoint_best.pt", torch_bytes(state))
    assert "no optimizer state of decoder.layers" in refused(read_checkpoint, tmp_path / "checkpoint_best.pt")


def log_with(folder, old, new):
    path = write_run(folder / "run") / "rank0.log"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return folder / "run"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'seed': 1", "'seed': [1]"),
        ("'seed': 1", "'sead': 1"),
        ("'update_freq': [1]", "'update_freq': 'x'"),
        ('"router": "hash"', '"router": 5'),
        ('"parameters_total": 500, ', ""),
        ('"wps": "100"', '"wps": [1, "x"]'),
        ('"ups": "2", ', ""),
        ('"valid_ppl": ', '"valid_x": '),
    ],
)
def test_a_log_that_says_something_of_another_kind(tmp_path, old, new):
    message = refused(read_logs, log_with(tmp_path, old, new))
    assert f"{tmp_path / 'run'}: " in message and ("its " in message)


@pytest.mark.parametrize("value", [DEEP, "(" * 300 + ")" * 300, "[1]: 2", "**x"])
def test_a_configuration_in_a_log_that_python_cannot_parse(tmp_path, value):
    """Python's parser raises MemoryError and RecursionError for brackets within each other."""
    folder = log_with(tmp_path, "'seed': 1", f"'seed': {value}")
    assert "cannot read a configuration" in refused(read_logs, folder) or "seed" in refused(read_logs, folder)


@pytest.mark.parametrize("line", ["[1]", DEEP])
def test_a_line_of_statistics_that_is_no_object_counts_as_cut_off(tmp_path, line):
    folder = write_run(tmp_path / "run")
    with (folder / "rank0.log").open("a") as log:
        log.write(f"[2026-01-02 03:59:59,123][train_inner][INFO] - {line}\n")
    read_logs(folder)


@pytest.mark.parametrize("result", ["79.8.80", "1e", "x"])
def test_an_evaluation_whose_result_is_no_number(tmp_path, result):
    folder = write_run(tmp_path / "run")
    path = folder / "eval-valid.log"
    path.write_text(path.read_text().replace("Perplexity: 20", f"Perplexity: {result}"))
    try:
        read_logs(folder)
    except UserError as error:
        assert result in str(error)


@pytest.mark.parametrize("content", ["[1]", DEEP, '{"commands": {"train": "x"}}', '{"commands": 1}'])
def test_a_run_whose_record_is_no_object(tmp_path, content):
    written(write_run(tmp_path / "run") / "run.json", content)
    assert "run.json" in refused(read_logs, tmp_path / "run")


@pytest.mark.parametrize(
    "content", [DEEP, '{"benchmark": "layer", "rows": [{}], "left_out": 0.5}', '{"benchmark": ["layer"]}']
)
def test_a_result_of_a_benchmark_that_is_nested_or_has_other_kinds(tmp_path, content):
    assert "layer.json" in refused(load_benchmarks, [written(tmp_path / "layer.json", content)])


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("seed", [1]),
        ("learning_rate", "x"),
        ("validations", []),
        ("tokens", float("nan")),
        ("test", {"a": {}}),
        ("provenance", {"commit": "\ud800"}),  # half of a character
    ],
)
def test_a_record_of_a_study_with_another_kind_of_value(tmp_path, entry, value):
    from fuzz_reports import _records

    content = {**json.loads(_records()["10.json"]), entry: value}
    written(tmp_path / "10.json", json.dumps(content))
    assert "10.json is no record of a study" in refused(read_study_records, tmp_path)


GROWS = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefghi")
)
MAIN = (
    "title: a\nquestion: a\nlimits: a\nbaseline: A\nlearning_rates: [0.1]\nseeds: [1]\n"
    "text: {name: a, pieces: 300, train_tokens: 9, valid_tokens: 9, test_tokens: 9}\nmodels: {A: {experiment: a}}\n"
)


@pytest.mark.parametrize(
    "content",
    [
        MAIN.replace("{A: {experiment: a}}", "{A: 5}"),
        MAIN.replace("text: {", "text: [{").replace("9}", "9}]"),
        MAIN.replace("seeds: [1]", "seeds: [{a: 1}]"),
        MAIN.replace("seeds: [1]", "seeds: 1"),
        MAIN.replace("baseline: A", "baseline: {A: 1}"),
        MAIN + "grow: x\n",
        MAIN + "comparisons: [[A, {}]]\n",
        MAIN + "extends: [a]\n",
        MAIN + "extends: ../s\n",
        MAIN + "extends: s\n",
        MAIN.replace("title: a", "title: ${title}"),
        "[1]\n",
        "a: " + "[" * 20_000,
        GROWS,
        "title: !!python/object/apply:os.system ['true']\n",
    ],
)
def test_a_definition_of_a_study_with_another_kind_of_value(tmp_path, content):
    load_study(written(tmp_path / "whole.yaml", MAIN))
    written(tmp_path / "s.yaml", content)
    assert "s.yaml" in refused(read_study, tmp_path)


@pytest.mark.parametrize("content", [ALONE, _large_dictionary()], ids=["without a checksum", "with checksums"])
def test_an_xz_file_that_asks_for_gigabytes(tmp_path, content):
    path = written(tmp_path / "t.xz", content)
    assert "cannot read" in refused(lambda: list(read_lines([path], lambda done: None)))
    assert "damaged or not an archive" in refused(
        fetch_text, CORPORA["cc100-en"], tmp_path / "out", path, None, lambda *progress: None
    )


def test_xz_files_are_read_whole(tmp_path):
    """In several streams with zeros between and behind them, as xz reads them, and not with anything else there."""
    pack = PACKED[".xz"]
    whole = (
        (pack(TEXT), TEXT),
        (pack(TEXT * 3000) + pack(TEXT), TEXT * 3001),
        (pack(TEXT) + bytes(8) + pack(TEXT) + bytes(4), TEXT * 2),
        (pack(b"x"), b"x"),
    )
    for content, text in whole:
        lines = list(read_lines([written(tmp_path / "t.xz", content)], lambda done: None))
        assert lines == [line.rstrip("\r") for line in text.decode().removesuffix("\n").split("\n")]
    for content in (pack(TEXT)[:-1], pack(TEXT) + b"x", pack(TEXT)[:20], b""):
        path = written(tmp_path / "t.xz", content)
        assert refused(lambda path=path: list(read_lines([path], lambda done: None)))


def test_a_document_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.corpora.LONGEST_DOCUMENT", 1000)
    path = written(tmp_path / "a.xz", lzma.compress(b"word\n" * 500))
    message = refused(fetch_text, CORPORA["cc100-en"], tmp_path / "out", path, None, lambda *progress: None)
    assert "without a blank line" in message


@pytest.mark.parametrize(
    "content",
    [DEEP, "[]", '{"url": "u", "validator": 5, "total": 1}', '{"url": "u", "validator": "a\\r\\nb", "total": 1}'],
)
def test_a_sidecar_of_a_download_that_says_something_else(tmp_path, content):
    """What it says would be sent in a header."""
    assert _remembered(written(tmp_path / "sidecar", content), "u") == {"validator": None, "total": None}


def test_archives_and_arrays_that_are_used_here_are_what_they_seem():
    assert zipfile.is_zipfile(io.BytesIO(torch_bytes({})))
    assert np.frombuffer(kept()["data/train.bin"], dtype="<u2").max() < len(symbols())


@pytest.mark.parametrize("text", ["the 5\n\nof 3\n", "the 5\nof 3\n\n", "\n", "the 5\n \t\nof 3\n"])
def test_dictionary_with_a_blank_line_is_refused(tmp_path, text):
    """fairseq refuses it as well, with a traceback; here it had been left out."""
    path = tmp_path / "dict.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"line \d is not a symbol and its count"):
        read_dictionary(path)
    with pytest.raises(ValueError, match="Incorrect dictionary format"):
        Dictionary.load(str(path))


def test_a_report_of_logs_that_lack_what_it_shows():
    """A statistic without values, and a table without a column: both were tracebacks of the report."""
    row = {"model": "a", "runs": 1, "parameters_total": 1, "parameters_active": 1, "wall_seconds": 1.0}
    lacking = ("load_max_train", "load_max_valid", "dropped")
    models = pd.DataFrame([row | dict.fromkeys(lacking, float("nan"))])
    assert list(for_readers(models)["Updates"]) == ["–"]
    assert math.isnan(_mean([{"other": 1.0}], "load_max"))
