"""The report on the experts of a run: its numbers are those of naive loops, and what does not fit is refused."""

import functools
import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import recorded
import torch
from called import call, refused
from fairseq import checkpoint_utils
from sklearn.metrics import normalized_mutual_info_score
from small_models import OPTIONS, checkpoint, loaded

import fairseq_hash
from fairseq_hash.api.routes import sparse_layers
from fairseq_hash.core.errors import UserError
from fairseq_hash.expert_report import checkpoints, differences
from fairseq_hash.expert_report.checkpoints import by_update, checkpoint_of, updates_of
from fairseq_hash.expert_report.differences import of_outputs, of_weights
from fairseq_hash.expert_report.overlap import Pairs, agreement, by_chance, by_table, overlap
from fairseq_hash.expert_report.routed import INPUTS, routed_layers

VOCABULARY, EXPERTS = 30, 5


def drawn(seed, choices=400):
    """Token ids of very different frequency, and experts that depend on them in part."""
    generator = np.random.default_rng(seed)
    token_C = (VOCABULARY * generator.random(choices) ** 3).astype(np.int64)
    expert_C = np.where(generator.random(choices) < 0.6, token_C % EXPERTS, generator.integers(0, EXPERTS, choices))
    return token_C, expert_C


def test_pairs_count_choices():
    token_C, expert_C = drawn(1)
    pairs = Pairs.of(token_C, expert_C)
    counted = Counter(zip(token_C.tolist(), expert_C.tolist(), strict=True))
    found = zip(pairs.token_P.tolist(), pairs.expert_P.tolist(), pairs.count_P.tolist(), strict=True)
    assert [(token, expert, count) for token, expert, count in found] == [
        (*key, counted[key]) for key in sorted(counted)
    ]
    halves = Pairs.of(token_C[:150], expert_C[:150]) + Pairs.of(token_C[150:], expert_C[150:])
    for one, other in zip(vars(halves).values(), vars(pairs).values(), strict=True):
        assert (one == other).all()
    assert pairs.load_E(7).tolist() == [(expert_C == expert).sum() for expert in range(7)]
    assert pairs.total == 400


def test_the_most_frequent_expert_of_a_token():
    pairs = Pairs.of(np.array([0, 0, 0, 2, 2, 5]), np.array([3, 1, 3, 4, 1, 2]))
    assert pairs.most_frequent_V(7).tolist() == [3, -1, 1, -1, -1, 2, -1]


@pytest.mark.parametrize("seed", range(3))
def test_overlap_is_that_of_loops_and_scikit_learn(seed):
    token_C, expert_C = drawn(seed)
    found = overlap(Pairs.of(token_C, expert_C))
    assert found.nmi == pytest.approx(normalized_mutual_info_score(token_C, expert_C, average_method="arithmetic"))
    best = {token: Counter(expert_C[token_C == token].tolist()).most_common(1)[0][0] for token in set(token_C.tolist())}
    hits = sum(best[token] == expert for token, expert in zip(token_C.tolist(), expert_C.tolist(), strict=True))
    assert found.share == hits / len(token_C)
    entropy = -sum(n / 400 * math.log(n / 400) for n in Counter(expert_C.tolist()).values())
    conditional = 0.0
    for token, expert in zip(token_C.tolist(), expert_C.tolist(), strict=True):
        own = expert_C[token_C == token]
        conditional -= math.log((own == expert).mean()) / 400
    assert found.explained == pytest.approx(1 - conditional / entropy)


def test_chance_and_a_table_are_the_ends_of_the_scale():
    token_C, expert_C = drawn(5, 4000)
    pairs = Pairs.of(token_C, expert_C)
    chance, table = by_chance(pairs), by_table(pairs, VOCABULARY, EXPERTS)
    for other in (chance, table):
        assert np.bincount(other.token_P, other.count_P).tolist() == np.bincount(token_C).tolist()
    assert chance.load_E(EXPERTS).tolist() == pairs.load_E(EXPERTS).tolist()
    assert overlap(chance).explained < 0.03 < overlap(pairs).explained < 1
    ends = overlap(table)
    assert ends.share == 1 and ends.explained == pytest.approx(1) and overlap(pairs).nmi < ends.nmi < 1
    assert len(set(table.token_P.tolist())) == len(table.token_P)  # one expert each
    load_E = np.sort(table.load_E(EXPERTS))
    assert load_E[-1] == table.count_P.max() and load_E[-2] < 1.1 * load_E[0]  # one token has an expert of its own


def test_a_text_without_repetition_has_a_table_too():
    pairs = Pairs.of(np.arange(6), np.array([0, 0, 1, 2, 2, 2]))
    assert by_table(pairs, 9, 3).load_E(3).tolist() == [2, 2, 2] and overlap(pairs).share == 1


def test_one_expert_and_one_token_are_decided():
    assert overlap(Pairs.of(np.array([1, 1]), np.array([0, 0]))).nmi == 1
    assert overlap(Pairs.of(np.array([1, 2]), np.array([0, 0]))).explained == 1


def test_agreement_counts_the_choices_of_tokens_that_kept_their_expert():
    one = Pairs.of(np.array([0, 0, 0, 1, 2, 2]), np.array([3, 3, 1, 2, 0, 1]))
    other = Pairs.of(np.array([0, 1, 2, 4]), np.array([3, 1, 0, 0]))
    assert agreement(one, other, 6) == 5 / 6  # tokens 0 and 2


def naive(vectors):
    """Cosines and distances of vectors, pair by pair."""
    experts = len(vectors)
    scale = math.sqrt(sum(float(vector @ vector) for vector in vectors) / experts)
    cosine = [[float(a @ b / (a.norm() * b.norm())) for b in vectors] for a in vectors]
    distance = [[float((a - b).norm()) / scale for b in vectors] for a in vectors]
    return np.array(cosine), np.array(distance)


@pytest.mark.parametrize("name", ["switch", "multi", "insert"])
def test_weights_are_compared_pair_by_pair(data, name, monkeypatch):
    monkeypatch.setattr(differences, "VALUES", 64)  # several pieces
    _, layer = sparse_layers(loaded(data, name).model)[1]
    parameters = list(layer.experts.parameters())
    vectors = [torch.cat([p[expert].double().flatten() for p in parameters]) for expert in range(4)]
    found = of_weights(layer)
    cosine, distance = naive(vectors)
    np.testing.assert_allclose(found.cosine_EE, cosine, atol=1e-9)
    np.testing.assert_allclose(found.distance_EE, distance, atol=1e-6)
    off = [cosine[i, j] for i in range(4) for j in range(4) if i != j]
    assert found.mean_cosine == pytest.approx(np.mean(off))
    above = {(i, j): cosine[i, j] for i in range(4) for j in range(i + 1, 4)}
    assert found.closest == max(above, key=above.get)


def by_hand(layer, expert, x_D):
    """What one expert makes of one input, from its weights."""
    experts = layer.experts
    hidden_F = experts.fc1_weight[expert].double() @ x_D + experts.fc1_bias[expert].double()
    return experts.fc2_weight[expert].double() @ hidden_F.relu() + experts.fc2_bias[expert].double()


@pytest.mark.parametrize("name", ["switch", "multi"])
def test_outputs_are_compared_on_the_same_inputs(data, name, monkeypatch):
    monkeypatch.setattr(differences, "VALUES", 1024)  # several pieces
    _, layer = sparse_layers(loaded(data, name).model)[1]
    x_MD = torch.randn(11, 16, generator=torch.Generator().manual_seed(1))
    found = of_outputs(layer, x_MD)
    y_EMD = torch.stack([torch.stack([by_hand(layer, expert, x_D.double()) for x_D in x_MD]) for expert in range(4)])
    cosines = np.mean([naive(list(y_EMD[:, m]))[0] for m in range(11)], axis=0)
    np.testing.assert_allclose(found.cosine_EE, cosines, atol=1e-5)
    np.testing.assert_allclose(found.distance_EE, naive(list(y_EMD.flatten(1)))[1], atol=1e-4)


def test_experts_that_say_nothing_have_no_direction(data):
    """A BASE stack starts with zero outputs."""
    _, layer = sparse_layers(loaded(data, "switch").model)[0]
    silent = of_outputs(layer, torch.zeros(3, 16))
    assert np.isfinite(silent.cosine_EE).all() and np.isfinite(silent.distance_EE).all()


@pytest.mark.parametrize("name", ["mixed", "several", "multi", "bigram"])
def test_routes_are_those_of_the_model_block_by_block(data, name):
    model = loaded(data, name)
    token_S = torch.randint(4, len(model.dictionary), (45,), generator=torch.Generator().manual_seed(2)).numpy()
    read = np.concatenate([[model.start], token_S])
    tables = [model.routes_read(torch.tensor(read[at : at + 16]), at) for at in range(0, len(read), 16)]
    expected = pd.concat(tables)
    for one in routed_layers(model, token_S, 16):
        of_layer = expected[expected["layer"] == one.place.number]
        counted = Counter(zip(of_layer["token"], of_layer["expert"], strict=True))
        symbols = [model.dictionary[token] for token in one.pairs.token_P]
        found = zip(symbols, one.pairs.expert_P.tolist(), strict=True)
        assert dict(zip(found, one.pairs.count_P.tolist(), strict=True)) == counted
        assert one.dropped == of_layer["dropped"].sum()
        assert one.x_MD.shape == (46, 16)


def test_inputs_are_the_layers_own_and_of_the_whole_text(data):
    model = loaded(data, "switch")
    token_S = torch.randint(4, len(model.dictionary), (5000,), generator=torch.Generator().manual_seed(2)).numpy()
    seen = []
    _, layer = sparse_layers(model.model)[1]
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].drop_padding(inputs[0])))
    one = routed_layers(model, token_S, 16)[1]
    hook.remove()
    assert one.x_MD.shape == (INPUTS, 16)
    places = [(torch.cat(seen) == x_D).all(dim=1).nonzero() for x_D in one.x_MD]
    assert all(len(place) for place in places) and max(int(place[0]) for place in places) > 4000


@functools.cache
def made_run(data, name):
    """A run with checkpoints of updates 2, 4 and 6; the last is called best, too."""
    folder = tempfile.mkdtemp(prefix=f"a run {name} ", dir=Path(data).parent)
    words = ("--max-tokens", "128", "--save-dir", folder, "--save-interval-updates", "2", "--lr", "0.05")
    trainer, iterator = recorded.make_trainer(data, (*words, *OPTIONS[name]))
    for updates in (2, 4, 6):
        recorded.run(trainer, iterator, updates)
        checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, iterator, 1.0 / updates)
    return Path(folder)


def test_checkpoints_come_by_their_updates(data, monkeypatch):
    folder = made_run(data, "mixed")
    main = checkpoint_of(folder, "best")
    assert main.name == "checkpoint_best.pt" and updates_of(main) == 6
    found = by_update(folder, main)
    assert list(found) == [2, 4, 6] and found[6] == main and found[2].name == "checkpoint_1_2.pt"
    monkeypatch.setattr(checkpoints, "MOST", 2)
    assert list(by_update(folder, folder / "checkpoint_1_4.pt")) == [2, 4, 6]  # the ends, and the one that is asked for


def done(*arguments):
    status, out, err = call(*arguments)
    assert status == 0, err
    return out


def test_a_run_is_reported(data, tmp_path):
    folder = made_run(data, "mixed")
    out = done("experts", folder, "--tokens", 300, "--out", tmp_path / "report")
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {
        *("index.html", "differences.png", "overlap.png"),
        *("experts.csv", "layers.csv", "checkpoints.csv", "experts.json"),
    }
    assert all(f"wrote {tmp_path / 'report' / name}" in out for name in written)
    content = json.loads((tmp_path / "report" / "experts.json").read_text())
    assert (content["update"], content["tokens"]) == (6, 301)
    hashed, switch = content["layers"]
    assert (hashed["router"], switch["router"]) == ("hash", "switch")
    # A hash layer is a table: each token has one expert.
    assert hashed["share"] == 1 and hashed["explained"] == pytest.approx(1)
    assert switch["share"] < 1 and switch["share_table"] == 1 and 0 < switch["share_chance"] < 1
    assert hashed["output_cosine"] != switch["output_cosine"] and -1 <= switch["weight_cosine"] <= 1

    history = pd.read_csv(tmp_path / "report" / "checkpoints.csv")
    assert history["update"].tolist() == [2, 4, 6] * 2
    assert history[history["update"] == 6]["as_last"].tolist() == [1, 1]
    assert history[history["layer"] == 0]["as_last"].tolist() == [1, 1, 1]  # the table stays
    by_name = {name: history[history["layer"] == 1][name].tolist()[-1] for name in ("share", "explained", "nmi")}
    assert by_name == pytest.approx({name: switch[name] for name in by_name})

    experts = pd.read_csv(tmp_path / "report" / "experts.csv", keep_default_na=False)
    model = fairseq_hash.load(folder / "checkpoint_best.pt")
    text = np.fromfile(Path(data) / "valid.bin", dtype=np.uint16)[:300].astype(np.int64)
    for one in routed_layers(model, text, 16):
        lines = experts[experts["layer"] == one.place.number]
        assert lines["tokens"].tolist() == one.load_E.tolist() and lines["tokens"].sum() == 301
        for line in lines.to_dict("records"):
            own = Counter()
            everywhere = Counter()
            for token, expert, count in zip(one.pairs.token_P, one.pairs.expert_P, one.pairs.count_P, strict=True):
                everywhere[model.dictionary[token]] += count
                if expert == line["expert"]:
                    own[model.dictionary[token]] += count
            assert line["kinds"] == len(own)
            assert line["whole_kinds"] == sum(own[token] == everywhere[token] for token in own)
            frequent = line["frequent"].split()
            assert [own[token] for token in frequent] == sorted(own.values(), reverse=True)[:8]
            worth = {t: n * math.log(n / (everywhere[t] * line["tokens"] / 301)) for t, n in own.items()}
            typical = [worth[token] for token in line["typical"].split()]
            assert typical == pytest.approx(sorted((v for v in worth.values() if v > 0), reverse=True)[:8])
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Do routes follow token ids?" in page and "How do experts differ?" in page and "http-equiv" in page
    for name in ("differences.png", "overlap.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_other_texts_checkpoints_and_places_of_experts(data, tmp_path):
    folder = made_run(data, "mixed")
    (tmp_path / "text.txt").write_text("word3 word1\nword2\n")
    out = done("experts", folder, tmp_path / "text.txt", "--checkpoint", "last")
    assert f"checkpoint_last.pt, after 6 updates; 6 tokens of {tmp_path / 'text.txt'}" in " ".join(out.split())
    assert "3 tokens of" in done("experts", folder, tmp_path / "text.txt", "--tokens", 2)
    out = done("experts", folder, data, "--subset", "test", "--tokens", 50)
    assert "51 tokens of" in out and "/test" in "".join(out.split())
    held = done("experts", folder, "--tokens", 100, "--out", tmp_path / "held")
    mapped = done("experts", folder, "--tokens", 100, "--map-experts", "--out", tmp_path / "mapped")
    assert mapped.replace("mapped", "held") == held


def test_of_one_checkpoint_there_is_no_history(data, tmp_path):
    out = done("experts", checkpoint(data, "switch").parent, "--tokens", 100, "--out", tmp_path / "report")
    assert "Over the checkpoints" not in out and not (tmp_path / "report" / "overlap.png").exists()
    assert "Over the checkpoints" not in (tmp_path / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("{none}",), "is a dense run: it has no experts; give a run with --sparse-layers and --router"),
        (("{empty}",), "has no checkpoint_last.pt; it has no checkpoint at all; give the folder of a run"),
        (("{run}", "--checkpoint", "last", "--summary"), "is a folder, and --summary needs a checkpoint; leave it out"),
        (("{run}", "--overwrite"), "is a folder, and --overwrite needs a checkpoint"),
        (("{file}", "{text}", "--subset", "test"), "is a file, and --subset needs the folder of a run; leave it out"),
        (("{file}", "{text}", "--tokens", 5), "is a file, and --tokens needs the folder of a run"),
        (("{file}", "{text}", "--checkpoint", "best"), "is a file, and --checkpoint needs the folder of a run"),
        (("{file}",), "give a file of text, or - for standard input"),
        (("{run}", "--tokens", 0), "--tokens 0 is out of range; give a number of 1 or more"),
        (("{run}", "{text}", "--subset", "test"), "--subset test is of a data folder, and TEXT is"),
        (("{run}", "--subset", "none"), "has no none.idx; give a folder that fairseq-preprocess wrote"),
        (("{run}", "nothing.txt"), "nothing.txt cannot be read (No such file or directory)"),
        (("{run}", "--out", "{text}"), "is a file; give a folder"),
        (("{run}", "--tokens-per-sample", 17), "--tokens-per-sample 17 is out of range; give 1 to 16"),
    ],
)
def test_what_does_not_fit_is_one_line(data, words, line, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("word1\n")
    names = {"run": made_run(data, "mixed"), "empty": tmp_path / "empty", "text": tmp_path / "text"}
    names |= {"none": checkpoint(data, "none").parent, "file": checkpoint(data, "hash")}
    assert line in refused("experts", *(str(word).format(**names) for word in words))


def test_a_checkpoint_without_its_updates_is_one_line(tmp_path):
    torch.save({"model": {}, "cfg": None}, tmp_path / "checkpoint_last.pt")
    with pytest.raises(UserError, match="does not say after how many updates it was saved"):
        updates_of(tmp_path / "checkpoint_last.pt")
