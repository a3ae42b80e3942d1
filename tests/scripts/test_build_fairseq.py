"""scripts/build_fairseq.py: every edit and every refusal on a small stand-in for the release, and what it built."""

import importlib.util
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "build_fairseq.py"

# The edited lines as they stand in the release, and as they must read afterwards.
RELEASE = {
    "setup.py": 'x = [\n            "hydra-core>=1.0.7,<1.1",\n            "omegaconf<2.1",\n            "bitarray",\n'
    '            "torchaudio>=0.8.0",\n]\n',
    "pyproject.toml": '[build-system]\nrequires = ["setuptools", "wheel", "cython"]\n',
    "fairseq/version.txt": "0.12.2\n",
    "fairseq/data/token_block_dataset.py": "len(sizes), dtype=np.compat.long\n",
    "fairseq/data/language_pair_dataset.py": "np.vectorize(self.num_tokens, otypes=[np.compat.long])\n",
    "fairseq/data/data_utils.py": "lens = np.fromiter(\n                    np.int,\n                )\n",
    "fairseq/modules/dynamic_crf_layer.py": 'scatter(2, targets, np.float("inf"))\n',
    "fairseq_cli/hydra_train.py": '@hydra.main(config_path=os.path.join("..", "fairseq", "config"), '
    'config_name="config")\ndef hydra_main(cfg):\n',
    "fairseq/models/distributed_fairseq_model.py": "_SLOWMO_DDP_DISABLED = False\ntry:\n"
    "    from fairscale.experimental.nn.data_parallel import (\n        SlowMoBaseAlgorithm,\n"
    "        SlowMoDistributedDataParallel,\n    )\nexcept ImportError:\n",
    "fairseq/utils.py": "                else:\n                    raise FileNotFoundError(module_path)\n",
    "fairseq/tasks/text_to_speech.py": '    logger.info("Please install tensorboardX: pip install tensorboardX")\n',
}
EDITED = {
    "setup.py": 'x = [\n            "hydra-core>=1.3",\n            "omegaconf>=2.3",\n            "bitarray",\n]\n',
    "pyproject.toml": '[build-system]\nrequires = ["setuptools<85", "wheel<1", "cython<4"]\n',
    "fairseq/version.txt": "0.12.2+rebuilt.4\n",
    "fairseq/data/token_block_dataset.py": "len(sizes), dtype=int\n",
    "fairseq/data/language_pair_dataset.py": "np.vectorize(self.num_tokens, otypes=[int])\n",
    "fairseq/data/data_utils.py": "lens = np.fromiter(\n                    int,\n                )\n",
    "fairseq/modules/dynamic_crf_layer.py": 'scatter(2, targets, float("inf"))\n',
    "fairseq_cli/hydra_train.py": "import warnings\n\nwith warnings.catch_warnings():\n"
    '    warnings.simplefilter("ignore")\n'
    '    main = hydra.main(config_path=os.path.join("..", "fairseq", "config"), config_name="config")\n\n\n'
    "@main\ndef hydra_main(cfg):\n",
    "fairseq/models/distributed_fairseq_model.py": "_SLOWMO_DDP_DISABLED = False\nimport warnings\n\ntry:\n"
    '    with warnings.catch_warnings():\n        warnings.simplefilter("ignore", FutureWarning)\n'
    "        from fairscale.experimental.nn.data_parallel import (\n            SlowMoBaseAlgorithm,\n"
    "            SlowMoDistributedDataParallel,\n        )\nexcept ImportError:\n",
    "fairseq/utils.py": "                else:\n                    raise SystemExit(\n"
    '                        f"fairseq: --user-dir {args.user_dir} is no folder here; give that of a plugin, "\n'
    '                        "as $(fairseq-hash user-dir) prints it"\n                    )\n',
    "fairseq/tasks/text_to_speech.py": '    logger.debug("Please install tensorboardX: pip install tensorboardX")\n',
}
CONFIGS = """\
from dataclasses import dataclass, field

@dataclass
class Inner:
    size: int = 1

@dataclass(frozen=True)
class Frozen:
    size: int = 1

def make():
    @dataclass
    class Local:
        size: int = 2
    return Local()

@dataclass
class Outer:
    inner: Inner = Inner()
"""


@pytest.fixture
def recipe():
    spec = importlib.util.spec_from_file_location("build_fairseq", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path, recipe, monkeypatch):
    """A source tree with the lines that are edited, and three bare @dataclass lines."""
    for name, text in RELEASE.items():
        path = tmp_path / "fairseq-0.12.2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "fairseq-0.12.2" / "fairseq" / "configs.py").write_text(CONFIGS)
    monkeypatch.setattr(recipe, "BARE_DATACLASS_COUNT", 3)
    return tmp_path / "fairseq-0.12.2"


def run_script(*arguments, **environment):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_edits_exactly_the_listed_lines(recipe, source):
    recipe.rewrite(source)
    assert {name: (source / name).read_text() for name in EDITED} == EDITED
    assert len(recipe.REWRITES) == 13, "add the new edit to RELEASE and EDITED above"


def test_configurations_import_after_the_edit(recipe, source):
    path = source / "fairseq" / "configs.py"
    if sys.version_info >= (3, 11):
        with pytest.raises(ValueError, match="mutable default"):
            exec(path.read_text(), {"__name__": "configs"})
    assert recipe.open_dataclasses(source) == 3
    edited = path.read_text()
    assert edited == CONFIGS.replace("@dataclass\n", "@dataclass(eq=False)\n")
    namespace = {"__name__": "configs"}
    exec(edited, namespace)
    assert namespace["Outer"]().inner.size == 1


@pytest.mark.parametrize("name", RELEASE)
@pytest.mark.parametrize("times", [0, 2])
def test_refuses_a_text_that_does_not_stand_there_once(recipe, source, name, times):
    (source / name).write_text(RELEASE[name] * times)
    with pytest.raises(recipe.BuildError, match=rf"^{Path(name).name} holds .* {times} times, expected once"):
        recipe.rewrite(source)


def test_refuses_another_number_of_dataclasses(recipe, source):
    (source / "fairseq" / "more.py").write_text("@dataclass\nclass More:\n    pass\n")
    with pytest.raises(recipe.BuildError, match="4 bare @dataclass lines, expected 3; is this fairseq 0.12.2"):
        recipe.rewrite(source)


def test_another_file_is_refused_before_it_is_opened(tmp_path):
    other = tmp_path / "fairseq-0.12.2.tar.gz"
    other.write_bytes(b"not the release")
    done = run_script("--out", tmp_path / "out", "--sdist", other)
    assert done.returncode == 1
    # The first checksum is sha256sum's of these bytes, the second the one that the package index publishes.
    assert done.stderr.splitlines() == [
        f"build_fairseq: {other} has sha256 7df2fd503649d891b89bc9740bad1b1139fdc690759813e07dd8781f5140ad07, "
        "the release has 34f1b18426bf3844714534162f065ab733e049597476daa35fffb4d06a92b524; download it again"
    ]
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path):
    done = run_script("--out", tmp_path / "out", "--sdist", tmp_path / "none.tar.gz")
    assert done.returncode == 1
    remedy = "give the released fairseq-0.12.2.tar.gz or leave --sdist out"
    assert done.stderr.splitlines() == [f"build_fairseq: {tmp_path}/none.tar.gz does not exist; {remedy}"]


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 14, 0), (4, 0, 0)])
def test_refuses_other_pythons(recipe, monkeypatch, version):
    monkeypatch.setattr(recipe.sys, "version_info", version)
    with pytest.raises(recipe.BuildError, match=rf"this is Python {version[0]}\.{version[1]}.*use Python 3.10 to 3.13"):
        recipe.require_toolchain()


def test_refuses_a_python_without_headers(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(recipe.BuildError, match="Python.h is missing; install .*python3-dev"):
        recipe.require_toolchain()


def test_refuses_a_machine_without_a_compiler(tmp_path):
    done = run_script("--out", tmp_path / "out", PATH=str(tmp_path), CXX="", CC="")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["build_fairseq: no C++ compiler on PATH; install g++ or clang++, or set CXX"]


def test_takes_the_compiler_that_is_there(recipe, monkeypatch, tmp_path):
    """A Python that was built with clang, on a machine that has c++ alone."""
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(recipe.sysconfig, "get_config_var", {"CXX": "clang++ -pthread", "CC": "clang"}.get)
    assert recipe.find_compilers() == {"CXX": "c++", "CC": "c++"}
    monkeypatch.setenv("CXX", f"{tmp_path}/c++ -O1")
    assert recipe.find_compilers()["CXX"] == f"{tmp_path}/c++ -O1"


def test_pip_failing_is_shown(tmp_path):
    done = run_script("--out", tmp_path / "out", PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    assert done.returncode == 1
    assert "No matching distribution found for fairseq==0.12.2" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("build_fairseq: `pip download` failed; its output stands above")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_wheel_appears_whole_under_its_name(recipe, source, tmp_path, monkeypatch):
    """From the archive to the wheel, with pip's part played by a stand-in."""
    sdist = tmp_path / "fairseq-0.12.2.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(source, "fairseq-0.12.2")
    monkeypatch.setattr(recipe, "SDIST_SHA256", recipe.hashlib.sha256(sdist.read_bytes()).hexdigest())

    def fake_pip(command, *arguments):
        folder, unpacked = Path(arguments[-2]), Path(arguments[-1])
        assert command == "wheel"
        assert (unpacked / "fairseq" / "version.txt").read_text() == "0.12.2+rebuilt.4\n"
        folder.mkdir()
        (folder / "fairseq-0.12.2+rebuilt.4-cp311-cp311-any.whl").write_bytes(b"wheel")

    def full_disk(source, target):
        Path(target).write_bytes(b"wh")
        raise OSError("disk full")

    monkeypatch.setattr(recipe, "run_pip", fake_pip)
    wheel = recipe.build(tmp_path / "out", sdist)
    assert wheel == tmp_path / "out" / "fairseq-0.12.2+rebuilt.4-cp311-cp311-any.whl"
    assert wheel.read_bytes() == b"wheel"
    assert list((tmp_path / "out").iterdir()) == [wheel]
    monkeypatch.setattr(recipe.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="disk full"):
        recipe.build(tmp_path / "other", sdist)
    assert not list((tmp_path / "other").glob("fairseq*"))


@pytest.mark.slow
def test_the_release_builds(tmp_path):
    """The real build: half a minute to a minute, and a package index. The set-up does the same on every new machine."""
    done = run_script("--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert done.stdout.splitlines()[-1] == str(wheel)
    assert wheel.name.startswith("fairseq-0.12.2+rebuilt.4-cp{}{}-".format(*sys.version_info[:2]))


def run_fairseq(folder, command, *arguments):
    program = Path(sys.executable).with_name(f"fairseq-{command}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [program, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of 200 lines, binarized by fairseq-preprocess."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("train", "valid"):
        (folder / f"{name}.txt").write_text("".join(f"a b {'c d ' * (i % 5)}e\n" for i in range(200)))
    files = ["--trainpref", "train.txt", "--validpref", "valid.txt", "--destdir", "bin"]
    run_fairseq(folder, "preprocess", "--only-source", *files)
    return folder


def test_train_and_eval_lm_run(corpus):
    """In break mode `eos`, which asks the release's NumPy for an alias that is gone."""
    model = ["--arch", "transformer_lm", "--decoder-layers", 1, "--decoder-embed-dim", 8, "--decoder-ffn-embed-dim", 8]
    data = ["bin", "--tokens-per-sample", 32, "--sample-break-mode", "eos", "--max-tokens", 512, "--cpu"]
    training = ["--task", "language_modeling", "--optimizer", "adam", "--lr", 0.01, "--max-update", 3]
    output = ["--save-dir", "checkpoints", "--tensorboard-logdir", "tensorboard"]
    run_fairseq(corpus, "train", *data, *model, "--decoder-attention-heads", 1, *training, *output)
    assert list(corpus.glob("tensorboard/*/events.out.tfevents*"))
    checkpoint = corpus / "checkpoints" / "checkpoint_last.pt"
    assert "Perplexity: " in run_fairseq(corpus, "eval-lm", *data, "--path", checkpoint, "--gen-subset", "valid")


def test_hydra_train_runs(corpus):
    (corpus / "toy.yaml").write_text(
        "# @package _group_\n"
        "common: {cpu: true}\n"
        'task: {_name: language_modeling, data: "???", tokens_per_sample: 32}\n'
        "model: {_name: transformer_lm, decoder_layers: 1, decoder_embed_dim: 8, decoder_ffn_embed_dim: 8,\n"
        "        decoder_attention_heads: 1}\n"
        "criterion: cross_entropy\n"
        "optimizer: {_name: adam}\n"
        "lr_scheduler: fixed\n"
        "dataset: {max_tokens: 512}\n"
        "optimization: {max_update: 3, lr: [0.01]}\n"
        f"checkpoint: {{save_dir: '{corpus}/hydra'}}\n"
    )
    run_fairseq(corpus, "hydra-train", "--config-dir", corpus, "--config-name", "toy", f"task.data={corpus}/bin")
    assert (corpus / "hydra" / "checkpoint_last.pt").is_file()


@pytest.mark.skipif("rebuilt.4" not in version("fairseq"), reason="needs the build of scripts/build_fairseq.py")
def test_a_user_dir_that_is_not_there_is_one_line(tmp_path):
    """No code of a plugin runs before fairseq looks for the folder."""
    program = Path(sys.executable).with_name("fairseq-train")
    done = subprocess.run([program, "data", "--user-dir", "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    remedy = "give that of a plugin, as $(fairseq-hash user-dir) prints it"
    assert done.stderr.splitlines() == [f"fairseq: --user-dir nowhere is no folder here; {remedy}"]
