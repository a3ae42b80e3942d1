"""`fairseq_hash.load`: what it gives is what fairseq computes, and routes are those of naive computations."""

import math
import re
import shutil

import pytest
import reference
import small_models
import torch
from fairseq import checkpoint_utils
from plugin import evaluate
from small_models import OPTIONS, checkpoint, loaded

import fairseq_hash
from fairseq_hash.api.routes import sparse_layers, watched
from fairseq_hash.core.errors import UserError

TEXT = "word3 word1 word7 word0 word0 word12 word5"
SPARSE = [name for name in OPTIONS if name != "none"]
EOS, PAD = 2, 1
EMBEDDING = "decoder.embed_tokens.weight"


def valid_lines(data):
    return (data.parent / "valid.txt").read_text().splitlines()


def experts_of(routes, layer):
    """Return the experts of each position in one layer, as lists."""
    of_layer = routes[routes["layer"] == layer]
    return [group["expert"].tolist() for _, group in of_layer.groupby("position")]


def saved(path):
    """Return what the main file holds of the model."""
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_fairseqs_own(data, name):
    """The same numbers as the model gives that fairseq itself loads, and of shape [L + 1, V]."""
    model = loaded(data, name)
    tokens = model.tokenize(TEXT)
    (direct,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint(data, name))])
    expected = direct.eval()(torch.cat([torch.tensor([EOS]), tokens])[None])[0][0]
    logits = model.logits(TEXT)
    assert logits.shape == (len(tokens) + 1, len(model.dictionary)) and logits.dtype == torch.float32
    assert torch.equal(logits, expected) and torch.equal(model.logits(tokens), expected)
    assert not logits.requires_grad
    torch.testing.assert_close(model.log_probabilities(TEXT), expected.log_softmax(-1))
    following = model.next_token_probabilities(TEXT, top=len(model.dictionary))
    assert following["probability"].sum() == pytest.approx(1, abs=1e-5)
    assert following["probability"].is_monotonic_decreasing
    best = model.next_token_probabilities(TEXT, top=1).iloc[0]
    assert best["id"] == int(expected[-1].argmax()) and best["token"] == model.dictionary[best["id"]]
    assert best["probability"] == pytest.approx(float(expected[-1].softmax(-1).max()))


def test_probabilities_are_those_of_eval_lm(data):
    """Each word's log-probability, and the loss over all of valid, line by line."""
    model = loaded(data, "mixed")
    done = evaluate(data, checkpoint(data, "mixed"), "--sample-break-mode", "eos", "--output-word-probs")
    said = done.stdout + done.stderr
    scores = {}
    for sample, line in re.findall(r"\| (\d+) (\S+ \[-?[\d.]+\].*)", said):
        scores[int(sample)] = [float(score) for score in re.findall(r"\[(-?[\d.]+)\]", line)]
    lines = valid_lines(data)
    assert len(scores) == len(lines) == 60
    total = tokens = 0
    for number, line in enumerate(lines):
        target = torch.cat([model.tokenize(line), torch.tensor([EOS])])
        ours = model.log_probabilities(line).gather(1, target[:, None]).flatten()
        assert ours.tolist() == pytest.approx(scores[number], abs=2e-6)
        total, tokens = total - float(ours.sum()), tokens + len(target)
    loss = float(re.search(r"Loss \(base 2\): ([\d.]+)", said).group(1))
    assert total / tokens / math.log(2) == pytest.approx(loss, abs=6e-5)


@pytest.mark.parametrize("name", ["hash", "per layer", "bigram", "history", "position", "multi", "several", "learned"])
def test_routes_of_hash_layers_stand_in_the_table(data, name):
    """Looked up by hand in the checkpoint's own table, at the row that a naive loop finds."""
    model, state = loaded(data, name), saved(checkpoint(data, name))
    read = [EOS, *model.tokenize(TEXT).tolist()]
    feature = model.model.decoder.options.feature
    routes = model.routes(TEXT)
    for layer in (0, 1):
        table = state[f"decoder.hash_tables.{layer if name == 'per layer' else 0}.expert"]
        rows = reference.feature_rows(read, feature.name, feature.length, PAD, len(table))
        expected = [table[row].tolist() for row in rows]
        assert experts_of(routes, layer) == expected
        shown = model.tables[layer].groupby("row")["expert"].apply(list)
        assert [shown[row] for row in rows] == expected
        if feature.name == "token":
            assert model.tables[layer].groupby("row")["token"].first().tolist() == model.dictionary.symbols
    if name == "per layer":
        assert experts_of(routes, 0) != experts_of(routes, 1)
    assert routes["token"].tolist()[:: len(routes) // len(read)] == [model.dictionary[token] for token in read]
    assert set(routes["position"]) == set(range(len(read))) and not routes["dropped"].any()
    if name != "learned":
        assert set(routes["weight"]) == {0.5 if name == "several" else 1.0}


def inputs_of(model, text):
    """Return what goes into the sparse layers, `[T, D]` by number: what the norm before, or the layer before, gives."""
    kept, layers = {}, model.model.decoder.layers
    is_inserted = len(layers) == 4
    hooks = []
    for layer in (0, 1):
        module = layers[2 * layer] if is_inserted else layers[layer].final_layer_norm

        def keep(_, __, output, layer=layer):
            kept[layer] = (output[0] if is_inserted else output)[:, 0]

        hooks.append(module.register_forward_hook(keep))
    model.logits(text)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("name", ["switch", "base", "insert", "learned"])
def test_learned_routes_and_weights_are_those_of_a_naive_computation(data, name):
    model, state = loaded(data, name), saved(checkpoint(data, name))
    routes, inputs = model.routes(TEXT), inputs_of(model, TEXT)
    for layer, x_TD in inputs.items():
        prefix = f"decoder.layers.{1 + 2 * layer if name == 'insert' else layer}.sparse.router."
        of_layer = routes[routes["layer"] == layer]
        weights = [group["weight"].tolist() for _, group in of_layer.groupby("position")]
        served = experts_of(routes, layer)
        if name == "switch":
            experts, gates, *_ = reference.switch_route(x_TD, state[prefix + "weight"])
        elif name == "learned":
            pairs = zip(x_TD, served, strict=True)
            gates = [reference.hash_weights(x_D, pair, state[prefix + "weight"], "softmax", 1) for x_D, pair in pairs]
        else:
            experts = reference.base_greedy(x_TD, state[prefix + "centroids"])
            gates = reference.base_gate(x_TD, state[prefix + "centroids"], experts)
        if name != "learned":  # whose experts are those of the table
            assert served == [[expert] for expert in experts]
        expected = torch.tensor([[float(gate) for gate in torch.atleast_1d(torch.as_tensor(row))] for row in gates])
        torch.testing.assert_close(torch.tensor(weights), expected, rtol=1e-5, atol=1e-6)
    assert len(set(routes["expert"])) > 1 and set(routes["layer"]) == {0, 1}


def test_dropped_tokens_are_those_over_the_capacity(data, tmp_path):
    """The first tokens of an expert are kept."""
    options = (*OPTIONS["hash"], "--eval-capacity-factor", "0.6")
    model = fairseq_hash.load(small_models.train(data, tmp_path, *options))
    text = " ".join(["word3 word1 word7"] * 3)
    routes = model.routes(text)
    experts = [one for (one,) in experts_of(routes, 0)]
    expected = [not kept for kept in reference.kept_under_capacity(experts, 4, 0.6)]
    assert routes[routes["layer"] == 0]["dropped"].tolist() == expected and 0 < sum(expected) < len(expected)


@pytest.mark.parametrize("name", SPARSE)
def test_routes_of_sampling_are_those_of_the_whole_text(data, name):
    """Token by token, the generator has the routes that one pass over the finished text shows."""
    model = loaded(data, name)
    with watched(model.model) as decisions:
        (sample,) = model.sample("word3 word1", length=8, seed=3)
    assert sample.given == 2 and len(sample.tokens) > 4
    routes = model.routes(sample.tokens)
    for place, layer in sparse_layers(model.model):
        steps = [step[1].expert_TK // layer.segments for step in decisions[layer]]
        # The generator does not read the last token; where the model itself ended the line, it reads one more.
        whole = experts_of(routes, place.number)
        assert [step[0].tolist() for step in steps] == whole[: len(steps)] and len(steps) >= len(whole) - 1


def test_greedy_sampling_takes_the_most_probable_token(data):
    model = loaded(data, "mixed")
    added = 0
    for given in ("word3 word1", "word7", "word12 word0", "word5 word5", "word30"):
        (sample,) = model.sample(given, length=6, beam=1)
        tokens, scores = model.tokenize(given).tolist(), []
        for _ in range(6):
            log_probability = model.log_probabilities(tokens)[-1].clone()
            log_probability[PAD] = -math.inf  # which is never generated
            best = int(log_probability.argmax())
            if best == EOS:
                break
            tokens.append(best)
            scores.append(float(log_probability[best]))
        assert sample.tokens.tolist() == tokens
        assert sample.log_probabilities.tolist() == pytest.approx(scores, abs=1e-4)
        assert sample.text == " ".join(model.dictionary[token] for token in tokens)
        assert model.sample(given, length=6, top_k=1)[0].tokens.tolist() == tokens
        added += len(scores)
    assert added


def test_samples_are_drawn_by_their_seed(data):
    model = loaded(data, "switch")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    drawn = [model.sample("word3", length=10, number=3, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    one, again, other = [[sample.text for sample in samples] for samples in drawn]
    assert one == again != other and len(set(one)) == 3
    for sample in drawn[0]:
        score = model.log_probabilities(sample.tokens)[:-1].gather(1, sample.tokens[:, None]).flatten()
        torch.testing.assert_close(sample.log_probabilities, score[sample.given :], atol=1e-4, rtol=1e-4)
    (begun,) = model.sample(length=3, top_p=0.9)
    assert begun.given == 0 and 1 <= len(begun.tokens) <= 3
    # At such a temperature the given tokens have the probability 0 in fp32.
    assert model.sample(TEXT, length=2, temperature=1e-3)[0].given == 7
    (best, _) = model.sample("word3", length=3, beam=4, number=2)
    assert best.given == 1


def test_text_and_tokens(data):
    model = loaded(data, "hash")
    tokens = model.tokenize("word3  word1\nword7")
    assert tokens.dtype == torch.int64
    assert [model.dictionary[token] for token in tokens] == ["word3", "word1", "</s>", "word7"]
    assert model.detokenize(tokens) == "word3 word1\nword7"
    assert model.routes("word3\nword1")["token"].tolist()[::2] == ["</s>", "word3", "</s>", "word1"]


def test_unknown_words_are_named(data, caplog):
    model = loaded(data, "hash")
    assert model.tokenize("word3 zebra word1 gnu zebra").tolist()[1] == model.dictionary.unk()
    assert caplog.messages == ["note: 3 of 5 tokens are not in the dictionary and are read as <unk>: zebra, gnu"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.logits(""), "the text has no token; give some"),
        (lambda model: model.logits(" \t"), "the text has no token"),
        (lambda model: model.routes(torch.tensor([[4, 5]])), r"token ids of shape \(1, 2\); give .* of shape \[L\]"),
        (lambda model: model.routes([4, 64]), "not all integers from 0 to 63"),
        (lambda model: model.routes([-1]), "not all integers from 0 to 63"),
        (lambda model: model.routes(torch.tensor([1.5])), "not all integers"),
        (
            lambda model: model.logits("word1 " * 16),
            "has 16 tokens, but the model reads 15 at once; give a shorter text",
        ),
        (lambda model: model.next_token_probabilities("word1", top=0), "top 0 is out of range; give 1 to 64"),
        (lambda model: model.next_token_probabilities("word1", top=65), "top 65 is out of range"),
        (lambda model: model.sample("word1\nword2"), "several lines, .* give one line"),
        (lambda model: model.sample("word1 " * 15), "after 15 of the text there is room for 0 more, not 1"),
        (lambda model: model.sample("word1", length=15), "after 1 of the text there is room for 14 more, not 15"),
        (lambda model: model.sample("word1", length=0), "--length 0 is out of range; give 1 or more"),
        (lambda model: model.sample("word1", number=0), "--number 0 is out of range; give 1 or more"),
        (lambda model: model.sample("word1", number=64), "--number 64 is out of range; give at most 63"),
        (lambda model: model.sample("word1", top_k=0), "--top-k 0 is out of range; give 1 or more"),
        (lambda model: model.sample("word1", top_k=65), "--top-k 65 is out of range; give at most 64"),
        (lambda model: model.sample("word1", top_p=0), "--top-p 0 is out of range; give a number above 0, up to 1"),
        (lambda model: model.sample("word1", top_p=math.nan), "--top-p nan is out of range"),
        (lambda model: model.sample("word1", temperature=0), "--temperature 0 is out of range; give a number above 0"),
        (lambda model: model.sample("word1", seed=-1), "--seed -1 is out of range; give 0 or more"),
        (lambda model: model.sample("word1", beam=2, number=3), "--beam 2 .* give 3 or more, as many as samples"),
        (lambda model: model.sample("word1", top_k=2, top_p=0.5), "--top-k and --top-p do not go together"),
        (lambda model: model.sample("word1", beam=2, top_p=0.5), "--top-p and --beam do not go together"),
    ],
)
def test_bad_calls_are_one_line(data, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(loaded(data, "hash"))
    assert "\n" not in str(error.value)


def test_a_model_is_loaded_without_its_data(data, tmp_path, monkeypatch):
    """The dictionary is found beside the checkpoint, or in a folder that is given; the shards beside the main file."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(data, tmp_path / "data")
    path = small_models.train(tmp_path / "data", folder, *OPTIONS["hash"])
    assert (folder / "experts").is_dir()
    expected = fairseq_hash.load(path).logits(TEXT)
    (tmp_path / "data").rename(tmp_path / "moved")
    missing = r"its dictionary is not there \("
    with pytest.raises(UserError, match=missing + ".*/data/dict.txt or .*; give its folder as data"):
        fairseq_hash.load(path)
    with pytest.raises(UserError, match=missing + r".*nowhere/dict.txt\)"):
        fairseq_hash.load(path, data=tmp_path / "nowhere")
    assert torch.equal(fairseq_hash.load(path, data=tmp_path / "moved").logits(TEXT), expected)
    shutil.copy(tmp_path / "moved" / "dict.txt", folder)
    assert torch.equal(fairseq_hash.load(str(path)).logits(TEXT), expected)
    assert torch.equal(fairseq_hash.load(path, map_experts=True).logits(TEXT), expected)
    symbols = (folder / "dict.txt").read_text().splitlines()
    (folder / "dict.txt").write_text("\n".join([symbols[1], symbols[0], *symbols[2:]]) + "\n")
    with pytest.raises(UserError, match="dictionary") as error:
        fairseq_hash.load(path)
    assert "\n" not in str(error.value)
    shutil.rmtree(folder / "experts")
    with pytest.raises(UserError, match="experts/.* cannot be read"):
        fairseq_hash.load(path, data=tmp_path / "moved")


def test_what_is_no_language_model_is_refused(data, tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("code was run",))

    state = torch.load(checkpoint(data, "none"), weights_only=True)
    cases = {
        "missing.pt": (None, "does not exist"),
        "text.pt": ("no checkpoint", "is damaged or no checkpoint"),
        "code.pt": ({**state, "extra_state": Code()}, "would run code from the file"),
        "nothing.pt": ({"model": {}, "cfg": None}, "does not say how its model was made"),
        "bare.pt": ({"model": {}, "cfg": state["cfg"]}, "is not a checkpoint of fairseq-train: it lacks 'best_loss'"),
        "other.pt": ({"model": {}, "cfg": {"task": {"_name": "translation"}}}, "trained for the task translation"),
        "sizes.pt": ({**state, "model": state["model"] | {EMBEDDING: torch.ones(3, 3)}}, "does not fit"),
    }
    for name, (content, message) in cases.items():
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=message) as error:
            fairseq_hash.load(tmp_path / name, data=data)
        assert "\n" not in str(error.value)
    path = checkpoint(data, "none")
    for options, message in (
        ({"device": "tpu"}, "device tpu is unknown; give cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "device cuda:99 is not there"),
        ({"sentencepiece": tmp_path / "none.model"}, "none.model does not exist"),
        ({"sentencepiece": tmp_path / "text.pt"}, "is not a SentencePiece model"),
    ):
        with pytest.raises(UserError, match=message):
            fairseq_hash.load(path, **options)


def test_fairseqs_own_model_is_loaded(data, tmp_path):
    options = ("--arch", "transformer_lm", "--criterion", "cross_entropy", "--decoder-input-dim", "16")
    model = fairseq_hash.load(small_models.train(data, tmp_path, *options, "--decoder-output-dim", "16"))
    assert model.num_experts == 0 and model.tables == {} and len(model.routes(TEXT)) == 0
    assert model.next_token_probabilities(TEXT, top=64)["probability"].sum() == pytest.approx(1, abs=1e-5)
    with pytest.raises(UserError, match="has no experts of this package; leave out map_experts"):
        fairseq_hash.load(tmp_path / "checkpoint_last.pt", map_experts=True)
    with pytest.raises(UserError, match="leave out map_experts and hash_predictor"):
        fairseq_hash.load(checkpoint(data, "none"), map_experts=True, hash_predictor="other.pt")


def test_an_oracle_predicts_no_text(data, tmp_path):
    options = ("--router", "hash", "--hash-feature", "future", "--sparse-layers", "0", "--num-experts", "4")
    model = fairseq_hash.load(small_models.train(data, tmp_path, *options))
    for call in (model.next_token_probabilities, model.sample):
        with pytest.raises(UserError, match="sees the token that it is to predict"):
            call(TEXT)
    # The route of a token is the next token's expert; the last has none.
    table = saved(tmp_path / "checkpoint_last.pt")["decoder.hash_tables.0.expert"][:, 0]
    following = [*model.tokenize(TEXT).tolist(), PAD]
    assert model.routes(TEXT)["expert"].tolist() == table[following].tolist()


def test_the_predicting_model_may_have_moved(data, tmp_path):
    predictor = tmp_path / "predictor.pt"
    predictor_folder = tmp_path / "of the predictor"
    small_models.train(data, predictor_folder)
    shutil.copy(predictor_folder / "checkpoint_last.pt", predictor)
    options = ("--router", "hash", "--hash-feature", "predicted", "--hash-predictor", predictor)
    path = small_models.train(data, tmp_path / "model", *options, "--sparse-layers", "0", "--num-experts", "4")
    expected = fairseq_hash.load(path).routes(TEXT)
    predictor.rename(tmp_path / "moved.pt")
    with pytest.raises(UserError, match="--hash-predictor .*predictor.pt cannot be used"):
        fairseq_hash.load(path)
    model = fairseq_hash.load(path, hash_predictor=tmp_path / "moved.pt")
    assert model.routes(TEXT).equals(expected)
    table = saved(path)["decoder.hash_tables.0.expert"][:, 0]
    predicted = fairseq_hash.load(tmp_path / "moved.pt").logits(TEXT).argmax(-1)
    assert expected["expert"].tolist() == table[predicted].tolist()
