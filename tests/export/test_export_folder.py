"""The exported folder: what is in it, what else the model does there, and what is refused."""

import json
import shutil

import pytest
import torch
from called import call, refused
from checkpoint_ranks import PeakMemory
from made_exports import NEAR, PADDING, POSITIONS, export, feature, hash_layers, load, save, sentences
from safetensors import safe_open

pytest.importorskip("transformers")


@torch.no_grad()
def test_norms_behind_the_blocks(data, tmp_path, monkeypatch):
    """As fairseq-hydra-train builds it by default; the architectures of the command line do not."""
    from fairseq_hash.lm import model as plugin

    original = plugin.base_lm_architecture

    def behind(args):
        original(args)
        args.decoder_normalize_before = False

    monkeypatch.setattr(plugin, "base_lm_architecture", behind)
    checkpoint, ours, task = save(data, tmp_path / "saved", *hash_layers())
    theirs = load(export(checkpoint, tmp_path / "out"))
    assert not theirs.config.normalize_before and not theirs.config.final_norm
    token_BL, _ = sentences(task)
    torch.testing.assert_close(theirs(input_ids=token_BL).logits, ours(token_BL)[0], **NEAR)


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """A sharded checkpoint of hash layers over pairs of tokens, the model and its task."""
    return save(data, tmp_path_factory.mktemp("saved") / "run", *feature("bigram"))


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """The folder of its export."""
    return export(saved[0], tmp_path_factory.mktemp("exported") / "my model")


@torch.no_grad()
def test_the_loss_is_the_criterions(saved, exported):
    """The mean over tokens in nats; what is not to be predicted is left out. `logits_to_keep` and tuples, too."""
    _, ours, task = saved
    theirs = load(exported)
    token_BL, padded_BL = sentences(task)
    labels = padded_BL.masked_fill(padded_BL == PADDING, -100)
    output = theirs(input_ids=padded_BL, labels=labels)
    logits = ours(padded_BL)[0]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected, **NEAR)
    assert output.hidden_states is None
    last = theirs(input_ids=token_BL, logits_to_keep=2, return_dict=False)[0]
    torch.testing.assert_close(last, ours(token_BL)[0][:, -2:], **NEAR)
    states = theirs(input_ids=token_BL, output_hidden_states=True).hidden_states
    for state, expected in zip(states, ours(token_BL)[1]["inner_states"], strict=True):
        torch.testing.assert_close(state, expected.transpose(0, 1), **NEAR)


@torch.no_grad()
def test_training_goes_on_there(saved, exported, tmp_path):
    """Every weight has the gradient that it has in fairseq; transformers saves what it loads."""
    _, ours, task = saved
    theirs = load(exported)
    token_BL, _ = sentences(task)
    with torch.enable_grad():
        ours.zero_grad()
        ours(token_BL)[0].log_softmax(dim=-1)[..., 5].sum().backward()
        theirs(input_ids=token_BL).logits.log_softmax(dim=-1)[..., 5].sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(gradients.pop(name), parameter.grad, rtol=1e-4, atol=1e-4)
    assert not gradients
    theirs.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(input_ids=token_BL).logits, theirs(input_ids=token_BL).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(saved, exported, dtype):
    """Tables stay whole numbers."""
    _, ours, task = saved
    theirs = load(exported, dtype=dtype)
    assert theirs.decoder.hash_tables[0].expert.dtype == torch.int64
    token_BL, _ = sentences(task)
    logits = theirs(input_ids=token_BL).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), ours(token_BL)[0], rtol=0.1, atol=0.1)


@torch.no_grad()
def test_a_cache_without_the_prefix(saved, exported, data, tmp_path):
    """Where a table looks at earlier tokens it is asked for, otherwise only their number counts."""
    token_BL, _ = sentences(saved[2])
    looking = load(exported)
    made = looking(input_ids=token_BL[:, :6], use_cache=True)
    cache = getattr(made, "cache", None) or made.past_key_values
    with pytest.raises(ValueError, match="--hash-feature bigram looks at earlier tokens: give all 6 cached ones and"):
        looking(input_ids=token_BL[:, 6:], past_key_values=cache)
    with pytest.raises(ValueError, match="give input_ids: hash tables look tokens up"):
        looking(inputs_embeds=torch.zeros(1, 2, 32))
    checkpoint, _, _ = save(data, tmp_path / "run", *hash_layers())
    plain = load(export(checkpoint, tmp_path / "token"))
    made = plain(input_ids=token_BL[:, :6], use_cache=True)
    cache = getattr(made, "cache", None) or made.past_key_values
    rest = plain(input_ids=token_BL[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(rest, plain(input_ids=token_BL).logits[:, 6:], **NEAR)


@torch.no_grad()
def test_an_oracle_does_not_generate(data, tmp_path):
    checkpoint, ours, task = save(data, tmp_path / "run", *feature("future"))
    folder = export(checkpoint, tmp_path / "out")
    theirs = load(folder)
    for token_BL in sentences(task):
        real_BL = token_BL != PADDING
        logits = theirs(input_ids=token_BL).logits
        torch.testing.assert_close(logits[real_BL], ours(token_BL)[0][real_BL], **NEAR)
    with pytest.raises(ValueError, match="--hash-feature future is an oracle: it sees the next token"):
        theirs.generate(token_BL, max_new_tokens=2)
    assert "**An oracle.**" in (folder / "README.md").read_text()


def test_more_tokens_than_positions(data, tmp_path):
    checkpoint, _, _ = save(data, tmp_path / "run", "--decoder-learned-pos")
    theirs = load(export(checkpoint, tmp_path / "out"))
    assert theirs(input_ids=torch.full((1, POSITIONS), 5)).logits.shape[1] == POSITIONS
    with pytest.raises(ValueError, match=f"more than the {POSITIONS} tokens that the model has positions for"):
        theirs(input_ids=torch.full((1, POSITIONS + 1), 5))


def test_what_is_in_the_folder(saved, exported):
    """All of it, and nothing of fairseq or of this package is imported there."""
    (_, ours, task), folder = saved, exported
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", "special_tokens_map.json"),
        *("modeling_fairseq_hash.py", "tokenization_fairseq_hash.py", "tokenizer_config.json", "vocab.json"),
    }
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    for path in folder.glob("*.py"):
        assert "import fairseq" not in path.read_text() and "from fairseq" not in path.read_text()
    _, report = load(folder, output_loading_info=True)
    assert not any(report.values()), report
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["hidden_size"], config["num_experts"]) == (len(task.source_dictionary), 32, 4)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 2, 1)
    card = (folder / "README.md").read_text()
    total = sum(parameter.numel() for parameter in ours.parameters())
    assert f"| parameters | {total:,}, of them " in card and 'folder = "my model"' in card
    assert "bigram, 1 a token" in card
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, parameter in ours.state_dict().items():
        if name in weights:
            assert torch.equal(weights.pop(name), parameter), name
    assert not weights


@torch.no_grad()
def test_weights_in_several_files(saved, tmp_path):
    """A tensor larger than the limit has a file of its own; transformers finds all of them by the index."""
    checkpoint, ours, task = saved
    folder = export(checkpoint, tmp_path / "out", "--shard-size", "20KB")
    files = sorted(folder.glob("model-*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and {path.name for path in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert not (folder / "model.safetensors").exists()
    total = 0
    for path in files:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert size <= 20000 or len(tensors) == 1
        assert all(index["weight_map"][name] == path.name for name in tensors)
        total += size
    assert index["metadata"]["total_size"] == total
    token_BL, _ = sentences(task)
    torch.testing.assert_close(load(folder)(input_ids=token_BL).logits, ours(token_BL)[0], **NEAR)


def test_a_plain_checkpoint_gives_the_same_files(saved, tmp_path):
    """One that `fairseq-hash checkpoint merge` made."""
    checkpoint, _, _ = saved
    assert call("checkpoint", "merge", checkpoint, "--no-optimizer", "--out", tmp_path / "plain.pt")[0] == 0
    (tmp_path / "one").mkdir()
    one = export(checkpoint, tmp_path / "one" / "model")
    other = export(tmp_path / "plain.pt", tmp_path / "model")
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_refusals(saved, data, tmp_path):
    checkpoint, _, _ = saved
    out = tmp_path / "out"

    def line(*more, of=checkpoint, to=out):
        said = refused("export", of, "--to", "hf", to, *more)
        assert not out.exists() and not list(tmp_path.glob(".*"))
        return said

    assert "nowhere.pt does not exist" in line(of=tmp_path / "nowhere.pt")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for taken in ("there", "link"):
        assert line(to=tmp_path / taken).endswith("exists; give a folder that does not exist yet")
    assert line(to=".").endswith(". exists; give a folder that does not exist yet")
    assert line(to=tmp_path / "no" / "out").endswith(f"the folder {tmp_path / 'no'} does not exist; make it first")
    for size in ("five", "0", "-1GB", "5TB"):
        said = line(f"--shard-size={size}")
        assert f"--shard-size {size} is no size; give bytes, or a number with KB, MB or GB" in said
    said = line("--data", tmp_path / "there")
    assert "there/dict.txt does not exist; give the folder of the training's data by --data" in said
    (tmp_path / "there" / "dict.txt").write_text("a 5\n")
    assert "is not the dictionary with which" in line("--data", tmp_path / "there")
    file = tmp_path / "there" / "dict.txt"
    assert f"--sentencepiece {file} is not a SentencePiece model; give" in line("--sentencepiece", file)
    assert "--sentencepiece nowhere does not exist; give" in line("--sentencepiece", "nowhere")
    status, _, err = call("export", checkpoint, "--to", "onnx", out)
    assert status == 2 and "invalid choice: 'onnx'" in err


def test_other_checkpoints(saved, tmp_path):
    """A smaller output dictionary; one rank's experts; a model that is no language model."""
    state = torch.load(saved[0], weights_only=True)
    small, other = saved[0].with_name("small.pt"), saved[0].with_name("other.pt")
    model = dict(state["model"])
    torch.save({**state, "model": {**model, "decoder.output_projection.weight": torch.zeros(9, 32)}}, small)
    said = refused("export", small, "--to", "hf", tmp_path / "out")
    assert f"predicts 9 of {len(saved[2].source_dictionary)} symbols (--output-dictionary-size)" in said
    torch.save({**state, "fairseq_hash": {"rank": 0}}, small)
    assert "has the experts of one rank only, as --ddp" in refused("export", small, "--to", "hf", tmp_path / "out")
    torch.save({**state, "model": {**model, "encoder.version": torch.zeros(1)}}, other)
    said = refused("export", other, "--to", "hf", tmp_path / "out")
    assert f"{other} is not a language model of this package or of fairseq's transformer_lm" in said
    assert not list(tmp_path.iterdir())


def test_half_precision_stays(saved, tmp_path):
    """A checkpoint of bfloat16 weights has a folder of such, and is loaded as such."""
    assert call("checkpoint", "merge", saved[0], "--no-optimizer", "--out", tmp_path / "plain.pt")[0] == 0
    state = torch.load(tmp_path / "plain.pt", weights_only=True)
    model = state["model"]
    model.update({name: value.bfloat16() for name, value in model.items() if value.is_floating_point()})
    torch.save(state, tmp_path / "half.pt")
    folder = export(tmp_path / "half.pt", tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    theirs = load(folder, dtype="auto")
    for name, parameter in theirs.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, state["model"][name]), name


def changed(checkpoint, path, **options):
    """Write a checkpoint as if it were trained with other options."""
    state = torch.load(checkpoint, weights_only=True)
    state["cfg"]["model"].update(options)
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptive_softmax_cutoff": "20,40"}, "was trained with --adaptive-softmax-cutoff 20,40, which the exported"),
        ({"adaptive_input": True}, "was trained with --adaptive-input True, which the exported model does not have"),
        ({"character_embeddings": True}, "was trained with --character-embeddings True, which"),
        ({"base_layers": 1}, "was trained with --base-layers 1, which"),
        ({"base_evaluation": "balanced"}, "was trained with --base-evaluation balanced, which the exported"),
        ({"scale_heads": True}, "was trained with --scale-heads True, which"),
        ({"quant_noise_pq": 0.1}, "was trained with --quant-noise-pq 0.1, which"),
        ({"activation_fn": "swish"}, "was trained with --activation-fn swish; the exported model has "),
        ({"decoder_layers_to_keep": "0"}, "was trained with --decoder-layers-to-keep 0, which"),
        ({"hash_feature": "predicted", "hash_predictor": "p.pt"}, "its routes are what another model (p.pt) predicts"),
    ],
)
def test_models_that_are_not_exported(saved, tmp_path, options, message):
    checkpoint, _, _ = saved
    path = changed(checkpoint, checkpoint.with_name("changed.pt"), **options)
    said = refused("export", path, "--to", "hf", tmp_path / "out")
    assert said.startswith(f"fairseq-hash: {path} ") and message in said
    assert not list(tmp_path.iterdir())


def test_a_damaged_expert(saved, tmp_path):
    """What was begun is gone; the folder never appears."""
    checkpoint = tmp_path / "run" / saved[0].name
    shutil.copytree(saved[0].parent, checkpoint.parent)
    (shard,) = checkpoint.parent.glob("experts/*.weights.*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "fails its checksum" in refused("export", checkpoint, "--to", "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_memory_is_that_of_one_expert(data, tmp_path):
    """134 MB of experts, 2 MB the largest tensor of one: the process grows by less than a fifth of them all."""
    wide = ("--decoder-embed-dim", "64", "--decoder-input-dim", "64", "--decoder-output-dim", "64")
    one_layer = ("--router", "hash", "--sparse-layers", "1", "--num-experts", "32", "--decoder-ffn-embed-dim", "8192")
    checkpoint, _, _ = save(data, tmp_path / "run", *wide, *one_layer)
    with PeakMemory() as memory:
        export(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 134e6
    assert memory.grown < 25e6
