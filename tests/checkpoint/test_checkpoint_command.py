"""`fairseq-hash checkpoint`: what `show`, `verify` and `table` find, and what all verbs refuse."""

import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from called import call, refused, shown
from plugin import build
from saved_checkpoints import EXPERTS, LAYERS, assert_equal, done, load, tensors, words

from fairseq_hash.checkpoint import convert
from fairseq_hash.checkpoint.directory import SHARDS
from fairseq_hash.cli.tables import read_dictionary
from fairseq_hash.core.errors import UserError
from fairseq_hash.hashing import TableShape, build_table, load_table
from fairseq_hash.hashing.table import table_fingerprint
from fairseq_hash.moe.parameter_counts import count_parameters
from fairseq_hash.provenance import __version__


def flip(path, place):
    """Flip one bit of a file, which no other file shares."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.unlink()
    path.write_bytes(content)


def tensor_place(path):
    """Return where the data of a main file's largest tensor begins."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size * ("/data/" in entry.filename))
        return path.read_bytes().index(archive.read(largest))


DAMAGES = {
    "a truncated shard": (lambda main, shard: shard.write_bytes(shard.read_bytes()[:-1]), "bytes and had"),
    "a shard cut in its header": (lambda main, shard: shard.write_bytes(shard.read_bytes()[:99]), "header is damaged"),
    "a bit of a row": (lambda main, shard: flip(shard, shard.stat().st_size - 7), "fails its checksum"),
    "a bit of the header": (lambda main, shard: flip(shard, 700), "is not the file that the checkpoint means"),
    "a bit of the header's length": (lambda main, shard: flip(shard, 6), "header is damaged"),
    "no shard": (lambda main, shard: shard.unlink(), "cannot be read"),
    "a bit of a dense tensor": (lambda main, shard: flip(main, tensor_place(main) + 1001), "fail their checksums"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds(saved, tmp_path, damage):
    """One line for it, and all other files are checked as well."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    shard = sorted((folder / SHARDS).glob("update-2.*.weights.*"))[0]
    change, text = DAMAGES[damage]
    change(folder / "two.pt", shard)
    status, out, err = call("checkpoint", "verify", folder / "two.pt", folder / "four.pt")
    is_main = damage == "a bit of a dense tensor"
    files = 4 if is_main else 8
    assert (status, err) == (1, f"fairseq-hash: 1 of {files} files are missing or damaged; use other checkpoints\n")
    lines = out.splitlines()
    (wrong,) = [line for line in lines if not line.startswith("ok: ")]
    assert len(lines) == files
    assert wrong.startswith(f"wrong: {folder / 'two.pt' if is_main else shard} ") and text in wrong


def test_verify_of_files_that_are_none_and_shards_that_are_not_all(saved, merged, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    state = load(saved / "two.pt")
    shards = [shard for shard in state["fairseq_hash"]["shards"] if shard["first"] == 0]
    state["fairseq_hash"]["shards"] = shards
    shutil.copytree(saved / SHARDS, tmp_path / SHARDS)
    torch.save(state, tmp_path / "half.pt")
    given = [tmp_path / "none.pt", tmp_path / "text.pt", tmp_path / "half.pt", merged / "two.pt"]
    status, out, err = call("checkpoint", "verify", *given)
    assert status == 1 and err.startswith("fairseq-hash: 3 of 6 files")
    wrong = [line for line in out.splitlines() if line.startswith("wrong: ")]
    assert wrong[0] == f"wrong: {given[0]} does not exist" and str(given[1]) in wrong[1]
    assert wrong[2] == f"wrong: {given[2]}: the checkpoint's weights shards hold experts 0 to 1, not 0 to 3"
    assert out.splitlines()[-1].startswith(f"ok: {merged / 'two.pt'}, ")


def test_show(data, saved, merged):
    """The facts of a sharded file against its own manifest, files and model; as tables, the same facts."""
    found = json.loads(done("show", saved / "two.pt", "--json"))
    manifest = load(saved / "two.pt")["fairseq_hash"]
    _, _, model, _ = build(data, *words())
    per_expert = 32 * 16 * 2 + 32 + 16
    experts = EXPERTS * len(LAYERS) * per_expert
    total, active = count_parameters(model)
    assert found["parameters"] == {"total": total, "dense": active - len(LAYERS) * per_expert, "experts": experts}
    sizes = {"main_file": (saved / "two.pt").stat().st_size}
    for part in ("weights", "optimizer"):
        files = (saved / SHARDS).glob(f"update-2.*.{part}.*")
        sizes[f"{part}_shards"] = sum(path.stat().st_size for path in files)
    assert found["bytes"] == sizes
    assert found["shards"] == manifest["shards"] and len(found["shards"]) == 4
    assert found["provenance"] == manifest["provenance"] and found["provenance"]["fairseq_hash"] == __version__
    expected = {"kind": "sharded", "update": 2, "epoch": 1, "router": "hash", "experts": EXPERTS}
    expected |= {"sparse_layers": [0, 1], "model_width": 16, "expert_hidden_width": 32, "optimizer": "FairseqAdam"}
    expected |= {key: manifest[key] for key in ("table_fingerprint", "dictionary_fingerprint", "save")}
    assert expected.items() <= found.items() and found["file"] == str(saved / "two.pt")
    plain = json.loads(done("show", merged / "two.pt", "--json"))
    differ = {"file", "kind", "bytes", "shards"}
    assert {key for key in found if found[key] != plain[key]} == differ and plain["kind"] == "plain"
    out = done("show", saved / "two.pt")
    facts, shards = out.split("┏")
    rows = shown(facts)
    assert rows["widths"] == "D 16, F 32" and rows["parameters"] == f"{total:,}" and rows["update"] == "2"
    assert rows["hash table"] == manifest["table_fingerprint"][:12] and rows["torch"] == found["provenance"]["torch"]
    assert shards.count("weights ") == shards.count("optimizer ") == 2


@pytest.mark.parametrize(
    ("router", "kind", "layers"), [("none", "dense", []), ("base", "plain", [0, 1]), ("switch", "plain", [1])]
)
def test_show_of_files_without_a_manifest(data, tmp_path, router, kind, layers):
    """Inserted stacks, which renumber the layers behind them; a dense model; another file than ours."""
    sparse = () if router == "none" else ("--num-experts", "3", "--sparse-layers", ",".join(map(str, layers)))
    insert = ("--sparse-placement", "insert", "--expert-sublayers", "2") if router == "base" else ()
    _, _, model, _ = build(data, "--router", router, *sparse, *insert)
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pt")
    found = json.loads(done("show", tmp_path / "bare.pt", "--json"))
    assert (found["kind"], found["sparse_layers"]) == (kind, layers)
    assert found["experts"] == (3 if layers else 0)
    total = count_parameters(model)[0] if layers else sum(p.numel() for p in model.parameters())
    assert found["parameters"]["total"] == total
    assert found["update"] is found["optimizer"] is found["save"] is None
    rows = shown(done("show", tmp_path / "bare.pt"))
    assert rows["kind"] == kind and rows["dictionary"] == "not known" and rows["hash table"] == "none"
    assert ("sparse layers" in rows) and "cannot" not in rows["sparse layers"]


def test_table(data, saved, merged, tmp_path):
    """It is the one that was trained with, and `--hash-table` takes it."""
    path = tmp_path / "t.safetensors"
    for source in (saved / "two.pt", merged / "two.pt"):
        assert done("table", source, "--overwrite", "--out", path) == f"wrote {path}\n"
        table = load_table(path)
        assert table.record.builder == "checkpoint"
        assert table_fingerprint(table.expert_HK) == load(source)["fairseq_hash"]["table_fingerprint"]
    symbols, counts = read_dictionary(data / "dict.txt")
    given = build_table(str(path), symbols, counts, TableShape(EXPERTS), 0)
    expected = build_table("balanced", symbols, counts, TableShape(EXPERTS), 0)
    assert np.array_equal(given.expert_HK, expected.expert_HK)


def test_refusals(saved, merged, tmp_path):
    out = ("--out", tmp_path / "out.pt")
    torch.save({"model": {"decoder.embed_tokens.weight": torch.ones(2, 2)}}, tmp_path / "dense.pt")
    state = load(merged / "two.pt")
    torch.save({**state, "fairseq_hash": {"experts": [0, 1]}}, tmp_path / "share.pt")
    del state["fairseq_hash"]
    torch.save(state, tmp_path / "foreign.pt")
    before = sorted(path.name for path in tmp_path.iterdir())
    for number in (0, -1, 5):
        line = refused("checkpoint", "split", merged / "two.pt", "--shards", number, *out)
        assert f"--shards {number} is out of range" in line and line.endswith("give a number of 1 to 4")
    for verb, name, text in (
        ("split", "dense.pt", "is a dense model"),
        ("split", "foreign.pt", "has experts but no manifest"),
        ("split", "share.pt", "has the experts of one rank only"),
        ("merge", "share.pt", "has the experts of one rank only"),
        ("merge", "none.pt", "does not exist"),
        ("show", "none.pt", "does not exist"),
        ("table", "dense.pt", "has no hash table"),
    ):
        message = refused("checkpoint", verb, tmp_path / name, *(() if verb == "show" else out))
        assert f"{tmp_path / name} {text}" in message
    for verb in ("merge", "split", "average", "table"):
        given = [merged / "two.pt"] * (2 if verb == "average" else 1)
        existing = refused("checkpoint", verb, *given, "--out", tmp_path / "dense.pt")
        assert existing.endswith("exists; give another file, or add --overwrite to replace it")
        assert "does not exist; make it first" in refused("checkpoint", verb, *given, "--out", tmp_path / "no" / "o.pt")
        assert "is a folder" in refused("checkpoint", verb, *given, "--overwrite", "--out", tmp_path)
    line = refused("checkpoint", "split", merged / "two.pt", "--out", tmp_path / "out.model")
    assert "does not end in .pt" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    done("merge", saved / "two.pt", "--overwrite", "--out", tmp_path / "dense.pt")
    assert_equal(tensors(tmp_path / "dense.pt"), tensors(merged / "two.pt"))


def test_what_fails_leaves_nothing(saved, merged, tmp_path, monkeypatch):
    """A row of the source that is damaged, a main file that cannot be written: no shard stays behind."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(saved, source)
    out.mkdir()
    shard = sorted((source / SHARDS).glob("update-2.*.optimizer.2-3.*"))[0]
    flip(shard, shard.stat().st_size - 7)
    for verb, more in (("merge", ()), ("split", ("--shards", 4))):
        line = refused("checkpoint", verb, source / "two.pt", *more, "--out", out / "o.pt")
        assert f"{shard} is damaged: " in line and "of expert 3 fails its checksum" in line
        assert [path.name for path in out.iterdir()] in ([], ["training.lock"])

    def full(state, path):
        assert len(list((out / SHARDS).iterdir())) == 4
        raise UserError(f"{path} cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_main", full)
        line = refused("checkpoint", "split", saved / "two.pt", "--shards", 2, "--out", out / "o.pt")
        assert "cannot be written" in line
    assert [path.name for path in out.iterdir()] == ["training.lock"]

    def interrupted_after(state, path, write=convert.write_main):
        write(state, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_main", interrupted_after)
        assert call("checkpoint", "split", saved / "two.pt", "--out", out / "o.pt")[0] == 130
    done("verify", out / "o.pt")


def test_a_folder_in_which_a_training_runs(saved, merged, tmp_path):
    """Its lock keeps shards out, and lets plain files in."""
    program = (
        "import sys; from pathlib import Path; from fairseq_hash.checkpoint.directory import lock\n"
        "lock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        while other.stdout.readline() != "locked\n":
            assert other.poll() is None
        for verb, given in (("split", [merged / "two.pt"]), ("average", [merged / "two.pt", saved / "four.pt"])):
            line = refused("checkpoint", verb, *given, "--out", tmp_path / "o.pt")
            assert line.startswith(f"fairseq-hash: --out {tmp_path / 'o.pt'}: a training saves to {tmp_path}, ")
        done("merge", saved / "two.pt", "--out", tmp_path / "o.pt")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["o.pt", "training.lock"]
        other.stdin.close()
    done("split", merged / "two.pt", "--overwrite", "--out", tmp_path / "o.pt")
