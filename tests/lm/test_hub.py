"""fairseq's own ways to a trained model: the hub interface and fairseq-interactive; and `--wandb-project`."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import small_models
import torch
from plugin import USER_DIR, command, records, train_arguments
from small_models import checkpoint

import fairseq_hash
from fairseq_hash.lm.model import HashTransformerLanguageModel

TEXT = "word3 word1 word7"
WANDB = '''
"""Stands in for wandb: writes what is told to it to the file WANDB_STAND_IN."""
import json, os
from numbers import Number


def write(what, content):
    with open(os.environ["WANDB_STAND_IN"], "a") as file:
        file.write(json.dumps([what, content]) + "\\n")


class Config:
    def update(self, config):
        write("config", sorted(map(str, config)))


config = Config()


def init(project, reinit=None, name=None):
    write("init", {"project": project, "name": name})


def log(values, step=None):
    for value in values.values():
        assert isinstance(value, Number), value  # as charts need
    write("log", {"step": step, **{name: float(value) for name, value in values.items()}})
'''


def hub(path, data, **options):
    return HashTransformerLanguageModel.from_pretrained(
        str(path.parent), checkpoint_file=path.name, data_name_or_path=str(data), **options
    )


@pytest.mark.parametrize("name", ["hash", "mixed", "insert", "none"])
def test_the_hub_interface_scores_and_samples(data, name):
    """Its scores are the log-probabilities, experts in shards included; greedy search is ours."""
    path = checkpoint(data, name)
    interface, model = hub(path, data), small_models.loaded(data, name)
    scored = interface.score(TEXT)
    expected = model.log_probabilities(TEXT)[:-1].gather(1, model.tokenize(TEXT)[:, None]).flatten()
    torch.testing.assert_close(scored["positional_scores"], expected)
    assert interface.sample(TEXT, beam=1, max_len_b=8) == model.sample(TEXT, length=5, beam=1)[0].text
    torch.manual_seed(3)
    drawn = interface.sample([TEXT] * 2, beam=1, sampling=True, sampling_topk=5, max_len_b=8)
    assert len(drawn) == 2 and all(text.startswith(TEXT) for text in drawn)


def test_the_hub_interface_reads_pieces(data):
    path, folder = small_models.checkpoint_of_pieces(data)
    interface = hub(path, folder, bpe="sentencepiece", sentencepiece_model=str(folder / "sentencepiece.model"))
    model = fairseq_hash.load(path)
    assert interface.encode("word3 a café")[:-1].tolist() == model.tokenize("word3 a café").tolist()
    scored = interface.score("word3 a café")
    tokens = model.tokenize("word3 a café")
    expected = model.log_probabilities(tokens)[:-1].gather(1, tokens[:, None]).flatten()
    torch.testing.assert_close(scored["positional_scores"], expected)
    assert interface.sample("word3 a", beam=1, max_len_b=8).startswith("word3 a")


def interactive(data, path, lines, folder, *words):
    (folder / "lines.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    fixed = (data, "--task", "language_modeling", "--user-dir", USER_DIR, "--path", path, "--cpu")
    return command("interactive", *fixed, "--input", folder / "lines.txt", *words).stdout


def test_fairseq_interactive_goes_on_from_lines(data, tmp_path):
    """Its hypotheses and scores (base 2, the given words included) are those of our own sampling."""
    said = interactive(data, checkpoint(data, "mixed"), [TEXT, "word30"], tmp_path, "--beam", 1, "--max-len-b", 8)
    model = small_models.loaded(data, "mixed")
    for number, line in enumerate((TEXT, "word30")):
        hypothesis = re.search(rf"^H-{number}\t(\S+)\t(.*)$", said, re.M)
        scores = [float(score) for score in re.search(rf"^P-{number}\t(.*)$", said, re.M)[1].split()]
        given = len(model.tokenize(line))
        (sample,) = model.sample(line, length=8 - given, beam=1)
        assert hypothesis[2] == sample.text
        tokens = torch.cat([sample.tokens, torch.tensor([model.dictionary.eos()])])
        expected = model.log_probabilities(sample.tokens).gather(1, tokens[:, None]).flatten() / math.log(2)
        assert scores == pytest.approx(expected.tolist(), abs=1e-3)


def test_fairseq_interactive_reads_pieces(data, tmp_path):
    path, folder = small_models.checkpoint_of_pieces(data)
    options = "--bpe sentencepiece --beam 2 --nbest 2 --sampling --sampling-topp 0.9 --max-len-b 12 --seed 4".split()
    words = ("--sentencepiece-model", folder / "sentencepiece.model", *options)
    said = interactive(folder, path, ["word3 a"], tmp_path, *words)
    found = re.findall(r"^D-0\t(\S+)\t(.*)$", said, re.M)
    assert len(found) == 2 and all(text.startswith("word3 a") for _, text in found)


def test_fairseq_interactive_says_in_a_line_what_it_cannot_read(data, tmp_path):
    fixed = (data, "--task", "language_modeling", "--user-dir", USER_DIR, "--cpu", "--input", tmp_path / "long.txt")
    (tmp_path / "long.txt").write_text(f"{TEXT}\n{'word1 ' * 30}\n")
    for path, line in (
        (checkpoint(data, "hash"), "a text of 31 tokens is too long: the model, or --max-tokens, takes 16 at once"),
        (tmp_path / "none.pt", "none.pt does not exist"),
    ):
        done = command("interactive", *fixed, "--path", path, "--buffer-size", 2, check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert line in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("fairseq_hash: ")


def test_wandb_gets_our_statistics(data, tmp_path):
    """By their names, as numbers, at the updates of the log; the lists of --log-expert-loads are left out."""
    (tmp_path / "site" / "wandb").mkdir(parents=True)
    (tmp_path / "site" / "wandb" / "__init__.py").write_text(WANDB)
    told = tmp_path / "told"
    options = ("--router", "hash,switch", "--sparse-layers", "0,1", "--num-experts", "4", "--log-expert-loads")
    done = train_with(tmp_path / "site", told, data, tmp_path / "run of it", *options, "--wandb-project", "a project")
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert ["init", {"project": "a project", "name": "run of it"}] in lines
    assert any("model" in keys[1] or "model._name" in keys[1] for keys in lines if keys[0] == "config")
    logged = {}
    for _, content in (line for line in lines if line[0] == "log"):
        step = content.pop("step")
        for name, value in content.items():
            logged.setdefault(name, {})[step] = value
    for tag, prefix in (("train_inner", ""), ("train", "train_"), ("valid", "valid_")):
        for record in records(done, tag):
            step = int(record[f"{prefix}num_updates"])
            for statistic in ("layer0_load_max", "layer0_dropped", "layer1_router_entropy", "layer1_balance_loss"):
                assert f"{prefix}{statistic}" in record, record
                value = logged[f"{tag}/{statistic}"][step]
                assert value == pytest.approx(float(record[f"{prefix}{statistic}"]), abs=1e-5)
            assert isinstance(record[f"{prefix}layer0_load"], list)
    assert len(logged["train_inner/layer0_load_max"]) == 8 and len(logged["valid/ppl"]) == 1
    assert not [name for name in logged if name.endswith("_load")]


def train_with(site, told, data, save_dir, *options):
    """Run `fairseq-train` in a Python of its own that finds the stand-in before all other packages."""
    program = site / "train.py"
    program.write_text("from fairseq_cli.train import cli_main\ncli_main()\n")  # its folder comes first
    environment = {**os.environ, "WANDB_STAND_IN": str(told), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = map(str, (program, *train_arguments(data, save_dir, *options)))
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done
