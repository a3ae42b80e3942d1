"""`fairseq-hash checkpoint`: its results against safetensors' own reader and numpy, and what it finds and refuses."""

import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import ranks
import recorded
import torch
from fairseq import checkpoint_utils
from plugin import USER_DIR, build, command
from safetensors import safe_open
from test_cli import call, refused, shown
from test_exactness import arguments

from fairseq_hash.checkpoint import convert
from fairseq_hash.checkpoint.directory import SHARDS
from fairseq_hash.cli.tables import read_dictionary
from fairseq_hash.errors import UserError
from fairseq_hash.hashing import build_table, load_table, table_fingerprint
from fairseq_hash.model import count_parameters
from fairseq_hash.provenance import __version__

EXPERTS, LAYERS = 4, (0, 1)


def words(*more):
    return arguments("hash", EXPERTS, "adam", *more)


def save(data, given, updates):
    """Train and save; `ranks` runs it, and one process calls it."""
    trainer, epoch_itr = recorded.make_trainer(data, given)
    recorded.run(trainer, epoch_itr, updates)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)


def state_of(trainer):
    """Return parameters and Adam's moments by name."""
    state = {}
    for name, parameter in trainer.get_model().named_parameters():
        moments = trainer.optimizer.optimizer.state.get(parameter, {})
        state[name] = parameter.detach()
        state.update({f"{name} {key}": moments[key] for key in ("exp_avg", "exp_avg_sq") if key in moments})
    return state


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """A folder with two checkpoints of one training: `two.pt` by two ranks, `four.pt` two updates later by one."""
    folder = tmp_path_factory.mktemp("saved [by] ranks")
    ranks.run(2, "test_checkpoint_command:save", str(data), words("--save-dir", str(folder)), 2)
    shutil.copy(folder / "checkpoint_last.pt", folder / "two.pt")
    save(data, words("--save-dir", str(folder)), 4)
    shutil.copy(folder / "checkpoint_last.pt", folder / "four.pt")
    return folder


@pytest.fixture(scope="module")
def merged(saved, tmp_path_factory):
    """The two as plain files."""
    folder = tmp_path_factory.mktemp("merged")
    for name in ("two.pt", "four.pt"):
        done("merge", saved / name, "--out", folder / name)
    return folder


def done(verb, *rest):
    """Return what a call prints that does what it should."""
    status, out, err = call("checkpoint", verb, *rest)
    assert (status, err) == (0, ""), err
    return out


def load(path):
    return torch.load(path, weights_only=True)


def tensors(path):
    """Return all tensors of a plain checkpoint by name, those of the optimizer's state as well."""
    state = load(path)
    optimizer = (state.get("last_optimizer_state") or {"state": {}})["state"]
    moments = {
        f"{number}/{key}": torch.as_tensor(value) for number, kept in optimizer.items() for key, value in kept.items()
    }
    return {**state["model"], **moments}


def plain(value):
    """Return a value with lists in the place of tensors."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value.tolist() if torch.is_tensor(value) else value


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def in_shards(path, part):
    """Return what the shards of a checkpoint hold, by safetensors' own reader."""
    shards = [shard for shard in load(path)["fairseq_hash"]["shards"] if shard["part"] == part]
    parts = {}
    for shard in sorted(shards, key=lambda shard: shard["first"]):
        with safe_open(path.parent / shard["file"], "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                parts.setdefault(name, []).append(file.get_tensor(name))
    return {name: torch.cat(values) for name, values in parts.items()}, len(shards)


@pytest.mark.parametrize(("name", "shards"), [("two.pt", 2), ("four.pt", 1)])
def test_merge_has_what_the_shards_hold(saved, merged, name, shards):
    before, after = load(saved / name), load(merged / name)
    weights, number = in_shards(saved / name, "weights")
    assert number == shards and len(weights) == 4 * len(LAYERS)
    assert_equal({**before["model"], **weights}, after["model"])
    moments, number = in_shards(saved / name, "optimizer")
    assert number == shards and len(moments) == 2 * len(weights)
    optimizer = before["last_optimizer_state"]
    for key, value in moments.items():
        parameter, _, moment = key.rpartition("/")
        optimizer["state"][before["fairseq_hash"]["numbers"][parameter]][moment] = value
    assert after["fairseq_hash"] == {**before["fairseq_hash"], "shards": []}
    for key in before.keys() - {"model", "fairseq_hash"}:
        assert plain(after[key]) == plain(before[key]), key


def test_fairseq_goes_on_from_what_was_made(data, saved, merged, tmp_path):
    """The trainer finds the same parameters and moments in the sharded, the merged and the split file."""
    done("merge", saved / "four.pt", "--no-optimizer", "--out", tmp_path / "weights.pt")
    done("split", merged / "four.pt", "--shards", 3, "--out", tmp_path / "split.pt")
    fresh = tmp_path / "run"
    fresh.mkdir()

    def trainer(path):
        return recorded.make_trainer(data, words("--save-dir", str(fresh), "--restore-file", str(path)))[0]

    expected = state_of(trainer(saved / "four.pt"))
    for path in (merged / "four.pt", tmp_path / "split.pt"):
        loaded = trainer(path)
        assert loaded.get_num_updates() == 4
        assert_equal(state_of(loaded), expected)
    without = trainer(tmp_path / "weights.pt")
    assert without.get_num_updates() == 0
    parameters = state_of(without)
    assert 0 < len(parameters) == len(expected) // 3
    assert_equal(parameters, {name: expected[name] for name in parameters})


def test_eval_lm_gives_one_loss(data, saved, merged, tmp_path):
    done("merge", merged / "four.pt", "--no-optimizer", "--out", tmp_path / "weights.pt")
    options = ("--user-dir", USER_DIR, "--cpu", "--gen-subset", "valid", "--tokens-per-sample", "16")
    losses = set()
    for path in (saved / "four.pt", tmp_path / "weights.pt"):
        evaluated = command("eval_lm", data, *options, "--path", path)
        (line,) = [line for line in evaluated.stderr.splitlines() if "Loss (base 2)" in line]
        losses.add(line.partition("Loss")[2])
    assert len(losses) == 1


def test_merge_without_optimizer(saved, merged, tmp_path):
    """The optimizer's shards are not needed for it."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    for path in (folder / SHARDS).glob("*optimizer*"):
        path.unlink()
    done("merge", folder / "two.pt", "--no-optimizer", "--out", tmp_path / "weights.pt")
    state = load(tmp_path / "weights.pt")
    assert "last_optimizer_state" not in state and state["fairseq_hash"]["numbers"] == {}
    assert_equal(state["model"], load(merged / "two.pt")["model"])
    assert "cannot be read" in refused("checkpoint", "merge", folder / "two.pt", "--out", tmp_path / "all.pt")
    assert not (tmp_path / "all.pt").exists()


@pytest.mark.parametrize("source", ["plain", "sharded"])
@pytest.mark.parametrize("shards", range(1, EXPERTS + 1))
def test_split_and_merge_again(saved, merged, tmp_path, source, shards):
    path = {"plain": merged, "sharded": saved}[source] / "two.pt"
    assert done("split", path, "--shards", shards, "--out", tmp_path / "s.pt") == f"wrote {tmp_path / 's.pt'}\n"
    main = load(tmp_path / "s.pt")
    assert not any(".experts." in name for name in main["model"])
    assert main["fairseq_hash"]["save"] != load(path)["fairseq_hash"]["save"]
    for part in ("weights", "optimizer"):
        sizes = [shard["experts"] for shard in main["fairseq_hash"]["shards"] if shard["part"] == part]
        assert len(sizes) == shards and sum(sizes) == EXPERTS and max(sizes) - min(sizes) <= 1
    named = {shard["file"] for shard in main["fairseq_hash"]["shards"]}
    assert {f"{SHARDS}/{file.name}" for file in (tmp_path / SHARDS).iterdir()} == named
    lines = done("verify", tmp_path / "s.pt").splitlines()
    assert len(lines) == 1 + 2 * shards and all(line.startswith("ok: ") for line in lines)
    done("merge", tmp_path / "s.pt", "--out", tmp_path / "m.pt")
    assert_equal(tensors(tmp_path / "m.pt"), tensors(merged / "two.pt"))


def numpy_mean(files):
    """Return the means of the floating-point weights of plain files, in float64, then in the files' type."""
    models = [load(file)["model"] for file in files]
    means = {}
    for name, last in models[-1].items():
        values = np.stack([model[name].numpy() for model in models])
        if values.dtype.kind == "f":
            values = values.astype(np.float64).mean(axis=0).astype(values.dtype)
            means[name] = torch.from_numpy(np.asarray(values))
        else:
            means[name] = last
    return means


@pytest.mark.parametrize(
    ("given", "shards"),
    [
        (("saved/two", "saved/four"), 1),
        (("saved/four", "merged/four", "saved/two"), 2),
        (("saved/two", "merged/four"), 0),
        (("merged/four", "merged/two", "merged/two"), 0),
    ],
)
def test_average_is_numpys(saved, merged, tmp_path, given, shards):
    """Any mix of sharded and plain; the last says what the result is, and all that is no weight."""
    folders = {"saved": saved, "merged": merged}
    paths = [folders[name.split("/")[0]] / f"{name.split('/')[1]}.pt" for name in given]
    done("average", *paths, "--out", tmp_path / "a.pt")
    result, last = load(tmp_path / "a.pt"), load(paths[-1])
    assert in_shards(tmp_path / "a.pt", "weights")[1] == len(result["fairseq_hash"]["shards"]) == shards
    expected = numpy_mean([merged / path.name for path in paths])
    assert_equal({**result["model"], **in_shards(tmp_path / "a.pt", "weights")[0]}, expected)
    assert not torch.equal(expected["decoder.embed_tokens.weight"], last["model"]["decoder.embed_tokens.weight"])
    tied = [result["model"][f"decoder.{name}.weight"].data_ptr() for name in ("embed_tokens", "output_projection")]
    assert tied[0] == tied[1]
    assert "last_optimizer_state" not in result
    own = {"save", "numbers", "shards", "provenance"}
    for key in last["fairseq_hash"].keys() - own:
        assert result["fairseq_hash"][key] == last["fairseq_hash"][key], key
    assert result["fairseq_hash"]["numbers"] == {}
    assert result["fairseq_hash"]["provenance"]["average_of"] == list(map(str, paths))
    for key in last.keys() - {"model", "last_optimizer_state", "fairseq_hash"}:
        assert plain(result[key]) == plain(last[key]), key
    done("verify", tmp_path / "a.pt")


def test_average_in_half_precision_without_a_manifest(merged, tmp_path):
    """Sums are not in half precision: 2048 + 1 would be 2048 there. Files of fairseq itself have no manifest."""
    paths = [tmp_path / f"{number}.pt" for number in range(3)]
    for path, first in zip(paths, (2048, 1, 1), strict=True):
        state = load(merged / "two.pt")
        del state["fairseq_hash"]
        state["model"] = {
            name: value.half() if value.dtype.is_floating_point else value for name, value in state["model"].items()
        }
        state["model"]["decoder.layers.0.sparse.experts.fc1_bias"][2, 3] = first
        torch.save(state, path)
    done("average", *paths, "--out", tmp_path / "a.pt")
    means = load(tmp_path / "a.pt")["model"]
    assert means["decoder.layers.0.sparse.experts.fc1_bias"][2, 3] == 683.5  # 683.33
    assert_equal(means, numpy_mean(paths))


def test_average_refusals(merged, tmp_path):
    """Another tensor's name, shape or whole numbers; another model by the manifest: each is named."""

    def changed(change):
        state = load(merged / "two.pt")
        change(state)
        torch.save(state, tmp_path / "other.pt")
        line = refused("checkpoint", "average", tmp_path / "other.pt", merged / "four.pt", "--out", tmp_path / "a.pt")
        assert not (tmp_path / "a.pt").exists()
        return line

    table = "decoder.hash_table.expert"
    assert f"{table} differs in" in changed(lambda state: state["model"][table].add_(1))
    name = "decoder.layers.1.sparse.experts.fc2_bias"
    assert f"{name} has shape [3, 16] in" in changed(
        lambda state: state["model"].update({name: state["model"][name][:3]})
    )
    assert f"has {name} and " in changed(lambda state: state["model"].pop(name))
    for key, value, text in (
        ("num_experts", 8, "has experts 8, "),
        ("dictionary_fingerprint", "ab" * 32, "has dictionary abababababab, "),
        ("table_fingerprint", "cd" * 32, "has hash table cdcdcdcdcdcd, "),
    ):
        line = changed(lambda state, key=key, value=value: state["fairseq_hash"].update({key: value}))
        assert text in line and line.endswith("give checkpoints of one model")
    line = refused("checkpoint", "average", merged / "two.pt", "--out", tmp_path / "a.pt")
    assert line.endswith("alone has no average; give two or more checkpoints")


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
    assert wrong[2] == f"wrong: {given[2]}: the checkpoint's weights shards hold experts [0, 1], not 0 to 3"
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
    sizes = {
        part: sum(path.stat().st_size for path in (saved / SHARDS).glob(f"update-2.*.{part}.*"))
        for part in ("weights", "optimizer")
    }
    size = (saved / "two.pt").stat().st_size
    assert found["bytes"] == {
        "main_file": size,
        "weights_shards": sizes["weights"],
        "optimizer_shards": sizes["optimizer"],
    }
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
        assert table_fingerprint(table.expert_VK) == load(source)["fairseq_hash"]["table_fingerprint"]
    symbols, counts = read_dictionary(data / "dict.txt")
    given = build_table(str(path), symbols, counts, EXPERTS, 0)
    assert torch.equal(given.expert_VK, build_table("balanced", symbols, counts, EXPERTS, 0).expert_VK)


def test_refusals(saved, merged, tmp_path):
    """One line, and nothing is written."""
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
        assert "cannot be written" in refused(
            "checkpoint", "split", saved / "two.pt", "--shards", 2, "--out", out / "o.pt"
        )
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
