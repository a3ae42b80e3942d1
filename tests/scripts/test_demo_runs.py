"""The demo's runs: their commands, what is done once and what again, with a stand-in for the commands themselves."""

import importlib
import io
import json
import zipfile
from pathlib import Path

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf
from rich.console import Console

from fairseq_hash.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CORPUS = {"data": "a corpus", "data_fingerprint": "f" * 64}
HEAD = "2026-01-02 03:04:05 | INFO |"
OUTPUT = {
    "train.log": [
        "a warning\n",
        f'{HEAD} train_inner | {{"ppl": "90.5", "wps": "1234.5", "num_updates": "6"}}\n',
        f'{HEAD} valid | {{"valid_ppl": "85.25", "valid_num_updates": "6"}}\n',
        f'{HEAD} train_inner | {{"ppl": "80.5", "wps": "1300", "num_updates": "12"}}\n',
        f'{HEAD} valid | {{"valid_ppl": "75.125", "valid_num_updates": "12"}}\n',
    ],
    "eval-valid.log": [f"{HEAD} fairseq_cli.eval_lm | Loss (base 2): 6.2, Perplexity: 75.13\n"],
    "eval-test.log": [f"{HEAD} fairseq_cli.eval_lm | Loss (base 2): 6.3, Perplexity: 78.80\n"],
}


def write_checkpoint(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", b"weights" * 1000)


class Commands:
    """Stands in for run_logged: says what a command would, leaves its checkpoints, and can fail at one."""

    def __init__(self):
        self.calls, self.fail_at, self.error = [], None, None

    def __call__(self, command, log, folder, on_line, append=False):
        self.calls.append((log.name, append))
        assert folder == ROOT and command[1] == "-m"
        if log.name == "train.log":
            for name in ("checkpoint_best.pt", "checkpoint_last.pt", "checkpoint_1_6.pt"):
                write_checkpoint(log.parent / name)
        if log.name == self.fail_at:
            raise self.error
        for line in OUTPUT[log.name]:
            on_line(line)


@pytest.fixture
def demo_runs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("demo_runs")


@pytest.fixture
def commands(demo_runs, monkeypatch):
    commands = Commands()
    monkeypatch.setattr(demo_runs, "run_logged", commands)
    return commands


@pytest.fixture
def make(demo_runs, tmp_path):
    """A call of make_run in tmp_path; returns the run's folder and what was shown."""

    def make_run(updates=12, model="hash", seed=1, **corpus):
        shown = Console(file=io.StringIO(), force_terminal=False, width=200, highlight=False, soft_wrap=True)
        with demo_runs.Display(1000, shown) as display:
            data = tmp_path / "data"
            folder = demo_runs.make_run(tmp_path, updates, model, seed, data, {**CORPUS, **corpus}, display)
        return folder, shown.file.getvalue()

    return make_run


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


ALL = [("train.log", True), ("eval-valid.log", False), ("eval-test.log", False)]


def test_a_run_is_made_once(make, commands):
    """Trained, evaluated on both subsets, recorded; only the best checkpoint stays. A second call does nothing."""
    folder, shown = make()
    assert commands.calls == ALL
    assert [path.name for path in folder.glob("*.pt")] == ["checkpoint_best.pt"]
    record = record_of(folder)
    assert list(record["done"]) == list(record["commands"]) == ["train", "valid", "test"]
    assert record["data"] == "a corpus" and record["data_fingerprint"] == "f" * 64
    assert all(command[:2] == ["python", "-m"] for command in record["commands"].values())
    for text in ("hash, seed 1: training", "update 12 of 12, perplexity 80.5, 1,300 tokens/s"):
        assert text in shown
    assert "hash, seed 1: training: validation perplexity 75.12\n" in shown
    assert "hash, seed 1: evaluation on test: perplexity 78.80\n" in shown
    again, shown = make()
    assert again == folder and commands.calls == ALL and record_of(folder) == record
    steps = ("training", "evaluation on valid", "evaluation on test")
    assert shown.splitlines() == [f"hash, seed 1: {step}: done before" for step in steps]


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_second_call_goes_on_where_the_first_stopped(make, commands, tmp_path, step, error):
    """With the step that was not done: a training from its checkpoints and in the same log."""
    commands.fail_at, commands.error = ALL[step][0], error("stop")
    with pytest.raises(error, match="stop"):
        make()
    (folder,) = (tmp_path / "runs").iterdir()
    assert list(record_of(folder)["done"]) == ["train", "valid"][:step]
    assert (folder / "checkpoint_last.pt").exists() == (step == 0)
    commands.fail_at, commands.calls = None, []
    make()
    assert commands.calls == ALL[step:] and list(record_of(folder)["done"]) == ["train", "valid", "test"]


def tear(path, how):
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "changed":
        place = content.index(b"weights")
        path.write_bytes(content[:place] + b"W" + content[place + 1 :])


@pytest.mark.parametrize("how", ["whole", "cut", "empty", "changed"])
@pytest.mark.parametrize("name", ["checkpoint_best.pt", "checkpoint_last.pt"])
def test_a_torn_checkpoint_leads_to_a_fresh_start(make, commands, monkeypatch, tmp_path, name, how):
    """All of them go, and it is said; whole ones stay for the training to go on from."""
    commands.fail_at, commands.error = "train.log", KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        make()
    (folder,) = (tmp_path / "runs").iterdir()
    tear(folder / name, how)
    found = []
    commands.fail_at = None
    monkeypatch.setattr(type(commands), "__call__", spy(type(commands).__call__, found, folder))
    _, shown = make()
    everything = ["checkpoint_1_6.pt", "checkpoint_best.pt", "checkpoint_last.pt"]
    assert found[0] == (everything if how == "whole" else [])
    assert (f"{folder / name} is not whole: this training starts from its beginning" in shown) == (how != "whole")


def spy(method, found, folder):
    """Note the checkpoints that are there when a command starts."""

    def call(*arguments, **named):
        found.append(sorted(path.name for path in folder.glob("*.pt")))
        return method(*arguments, **named)

    return call


def test_another_run_in_the_folder_is_refused(make, commands):
    folder, _ = make()
    record = record_of(folder)
    for key, value in (("options", ["--lr", "1"]), ("data_fingerprint", "0"), ("code", "0"), ("versions", {})):
        (folder / "run.json").write_text(json.dumps({**record, key: value}))
        with pytest.raises(UserError, match="holds another run; delete it, or give another --out$") as caught:
            make()
        assert str(caught.value).startswith(str(folder)) and record_of(folder)[key] == value
    assert len(commands.calls) == 3


def test_the_code_that_makes_a_run_is_all_of_the_package_but_what_looks_at_it(demo_runs, tmp_path):
    """A change in any folder makes another run; one in commands and reports does not."""
    folder = tmp_path / "package"
    for name in ("a.py", "checkpoint/b.py", "moe/kernels/c.py", "reporting/d.py", "cli/e.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1\n")
    before = demo_runs.code_fingerprint(folder)
    for name in ("a.py", "checkpoint/b.py", "moe/kernels/c.py", "reporting/d.py", "cli/e.py"):
        (folder / name).write_text("2\n")
        looks = name.startswith(("reporting", "cli"))
        assert (demo_runs.code_fingerprint(folder) == before) == looks, name
        (folder / name).write_text("1\n")
    (folder / "checkpoint" / "b.py").rename(folder / "moe" / "b.py")
    assert demo_runs.code_fingerprint(folder) != before


def test_whatever_changes_a_run_gives_it_another_folder(make, commands, demo_runs, monkeypatch):
    """Its options, data, code and versions; the name tells model and seed."""
    folders = [make(**change)[0] for change in ({}, {"updates": 13}, {"seed": 2}, {"model": "switch"}, {"data": "b"})]
    folders.append(make(data_fingerprint="0")[0])
    monkeypatch.setattr(demo_runs, "code_fingerprint", lambda folder: "0")
    folders.append(make()[0])
    monkeypatch.setattr(demo_runs.metadata, "version", lambda name: "0")
    folders.append(make()[0])
    assert len(set(folders)) == len(folders) == 8 and len(commands.calls) == 8 * 3
    assert folders[2].name.startswith("hash-seed2-") and folders[3].name.startswith("switch-seed1-")


def configuration(parser, words):
    """Return what fairseq makes of a command's words, flat."""
    arguments = options.parse_args_and_arch(parser, words)
    config = OmegaConf.to_container(convert_namespace_to_omegaconf(arguments), enum_to_str=True)
    return {
        f"{group}.{key}": v for group, inner in config.items() if isinstance(inner, dict) for key, v in inner.items()
    }


def test_the_models_differ_in_their_routers_only(demo_runs, monkeypatch, tmp_path):
    """As fairseq itself reads the commands: all else, and so the work for a token, is the same."""
    monkeypatch.chdir(ROOT)
    configs = {}
    for model in demo_runs.MODELS:
        step = demo_runs.steps_of(tmp_path, tmp_path, demo_runs.train_arguments(300, model, 3), 300)[0]
        assert step.command[1:3] == ["-m", "fairseq_cli.train"]
        configs[model] = configuration(options.get_training_parser(), step.command[3:])
    assert list(configs) == ["dense", "hash", "switch", "base"]
    routing = {"router", "num_experts", "sparse_layers", "hash_table", "capacity_factor", "router_jitter"}
    for config in configs.values():
        differing = {key for key in config if config[key] != configs["dense"].get(key)}
        assert {key.rpartition(".")[2] for key in differing} <= routing
        assert config["common.seed"] == 3 and config["optimization.max_update"] == 300
        assert config["checkpoint.save_dir"] == str(tmp_path) and config["common.log_format"] == "json"
    for name in ("hash", "switch", "base"):
        assert (configs[name]["model.num_experts"], configs[name]["model.sparse_layers"]) == (16, "1")


def test_evaluations_are_of_the_best_checkpoint_on_both_subsets(demo_runs, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    steps = demo_runs.steps_of(tmp_path, tmp_path, demo_runs.train_arguments(300, "hash", 1), 300)
    assert [step.name for step in steps] == ["train", "valid", "test"]
    training = configuration(options.get_training_parser(), steps[0].command[3:])
    for step in steps[1:]:
        assert step.command[1:3] == ["-m", "fairseq_cli.eval_lm"] and step.log == tmp_path / f"eval-{step.name}.log"
        config = configuration(options.get_eval_lm_parser(), step.command[3:])
        assert config["common_eval.path"] == str(tmp_path / "checkpoint_best.pt")
        assert config["dataset.gen_subset"] == step.name
        assert config["task.tokens_per_sample"] == training["task.tokens_per_sample"]


@pytest.mark.parametrize("updates", [10, 11, 300, 1_000_000])
def test_intervals_fit_any_number_of_updates(demo_runs, updates):
    """About thirty log intervals and six validations; none is of 0 updates."""
    words = demo_runs.train_arguments(updates, "dense", 1)
    values = {key: int(words[words.index(key) + 1]) for key in words if key.endswith(("-updates", "--log-interval"))}
    every = values["--validate-interval-updates"]
    assert every == values["--save-interval-updates"] and 6 <= updates / every <= 11 and values["--log-interval"] >= 1
    assert 10 <= updates / values["--log-interval"] <= 40 and 1 <= values["--warmup-updates"] <= updates / 10 + 1
