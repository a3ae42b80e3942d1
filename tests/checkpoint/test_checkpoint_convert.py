"""`fairseq-hash checkpoint merge`, `split` and `average`: against safetensors' own reader and numpy."""

import shutil

import numpy as np
import pytest
import recorded
import torch
from called import refused
from plugin import evaluate
from saved_checkpoints import EXPERTS, LAYERS, assert_equal, done, in_shards, load, plain, state_of, tensors, words

from fairseq_hash.checkpoint.directory import SHARDS


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
    losses = set()
    for path in (saved / "four.pt", tmp_path / "weights.pt"):
        evaluated = evaluate(data, path)
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
        model = state["model"]
        model.update({name: value.half() for name, value in model.items() if value.dtype.is_floating_point})
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

    table = "decoder.hash_tables.0.expert"
    assert f"{table} differs in" in changed(lambda state: state["model"][table].add_(1))
    name = "decoder.layers.1.sparse.experts.fc2_bias"
    line = changed(lambda state: state["model"].update({name: state["model"][name][:3]}))
    assert f"{name} has shape [3, 16] in" in line
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
