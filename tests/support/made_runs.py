"""Real runs for the tests of reports: trained and evaluated once a session, each with its logs in a folder.

`dense5`, `hash5` and `switch5` are trained in one go, `dense6` in two sessions, of which the second starts again from
update 4 of 6; `hydra` by fairseq-hydra-train, without an evaluation. What a test expects of a log it takes from the
text by a regular expression, not by the code under test.

`write_run` writes the logs of a run that never was, as fairseq-hydra-train and fairseq-eval-lm write them.
"""

import fcntl
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from plugin import USER_DIR, command, evaluate, train

from fairseq_hash.reporting.report import write_report

NAMES = ("dense5", "dense6", "hash5", "switch5")  # those that may be compared
FILES = ["expert_loads.png", "index.html", "learning_curves.png"]
FILES += ["results.csv", "results.json", "results.md", "runs.csv"]
SPARSE = ("--sparse-layers", "1", "--num-experts", "4")
ROUTERS = {
    "dense": ("--router", "none"),
    "hash": ("--router", "hash", *SPARSE),
    "switch": ("--router", "switch", *SPARSE, "--capacity-factor", "1.25"),
}
EVERY = ("--validate-interval-updates", "2", "--save-interval-updates", "4", "--no-epoch-checkpoints")
HYDRA = "task=language_modeling task.tokens_per_sample=16 common.cpu=true common.seed=5 common.log_format=json"
HYDRA += " common.log_interval=1 dataset.max_tokens=256 optimization.lr=[3e-3] optimization.max_update=2"
HYDRA += " checkpoint.no_save=true optimizer=adam lr_scheduler=fixed criterion._name=hash_moe"
HYDRA += " +model._name=hash_transformer_lm +model.decoder_layers=1 +model.decoder_embed_dim=16"
HYDRA += " +model.decoder_input_dim=16 +model.decoder_output_dim=16 +model.decoder_ffn_embed_dim=32"
HYDRA += " +model.decoder_attention_heads=2"


@pytest.fixture(scope="session")
def made(data, tmp_path_factory):
    """The folder of the runs, made once for all workers; read it only."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, whole = base / "runs", base / "runs are whole"
    with (base / "runs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if not whole.exists():
            _make(data, folder)
            whole.touch()
    return folder


def _make(data, folder):
    def one_go(router):
        _train(data, folder / f"{router}5", *ROUTERS[router])
        _evaluate(data, folder / f"{router}5")

    def two_sessions():
        _train(data, folder / "dense6", *ROUTERS["dense"], "--seed", "6", "--max-update", "6")
        shutil.copy(folder / "dense6" / "checkpoint_1_4.pt", folder / "dense6" / "checkpoint_last.pt")
        _train(data, folder / "dense6", *ROUTERS["dense"], "--seed", "6")
        _evaluate(data, folder / "dense6")

    def hydra():
        keys = [*HYDRA.split(), f"task.data='{data}'", f"common.user_dir='{USER_DIR}'"]
        _append(folder / "hydra" / "train.log", command("hydra_train", *keys, f"hydra.run.dir={folder / 'hydra'}"))

    # Two at a time: each command uses one core.
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(two_sessions), *(pool.submit(one_go, router) for router in ROUTERS), pool.submit(hydra)]
        for call in calls:
            call.result()


def _train(data, folder, *arguments):
    _append(folder / "train.log", train(data, folder, *EVERY, "--log-expert-loads", *arguments))


def _evaluate(data, folder):
    """Evaluate a run's last checkpoint as the README tells, into `eval-SUBSET.log`."""
    for subset in ("valid", "test"):
        done = evaluate(data, folder / "checkpoint_last.pt", "--gen-subset", subset)
        _append(folder / f"eval-{subset}.log", done)


def _append(log, done):
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(done.stdout + done.stderr)


@pytest.fixture(scope="session")
def reported(made, tmp_path_factory):
    """The folder of a report on the four runs, with a note and one run left out."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "note.txt").write_text("A first paragraph,\nof < 3 lines.\n\nA second one.\n")
    again = shutil.copytree(made / "hash5", folder / "again", ignore=shutil.ignore_patterns("*.pt"))
    runs = [*(made / name for name in NAMES), again]
    paths = write_report(runs, folder / "new" / "out", "Runs & <b>more</b>", folder / "note.txt")
    assert sorted(path.name for path in paths) == FILES and all(path.is_file() for path in paths)
    assert sorted(path.name for path in (folder / "new" / "out").iterdir()) == FILES
    return folder / "new" / "out"


@pytest.fixture
def copies(made, tmp_path):
    """Copies of the runs' logs, without checkpoints, for a test to spoil."""
    return shutil.copytree(made, tmp_path / "runs", ignore=shutil.ignore_patterns("*.pt", ".hydra"))


def edit(path, old, new, count=-1):
    """Replace text in a log; it must be there."""
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old} is not in {path}"
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def perplexity(folder, subset):
    """Return the perplexity that fairseq-eval-lm printed last."""
    return float(re.findall(r"Perplexity: (\S+)", (folder / f"eval-{subset}.log").read_text())[-1])


def raw(folder, tag):
    """Return the JSON records under a tag such as train_inner, in the order they were written."""
    text = (folder / "train.log").read_text()
    return [json.loads(line) for line in re.findall(rf"(?:\| {tag} \||\[{tag}\]\[INFO\] -) (\{{.*\}})", text)]


def model_record(folder):
    """Return the last record of the model in a training's log."""
    return json.loads(re.findall(r"model_record \| (\{.*\})", (folder / "train.log").read_text())[-1])


def markdown_table(text):
    """Return the first Markdown table as its rows' cells by heading, by the first cell."""
    lines = text.split("\n\n")[1].splitlines()
    headings, _, *rows = [line.strip("| ").split(" | ") for line in lines]
    return {row[0]: dict(zip(headings, row, strict=True)) for row in rows}


def write_run(folder, experiment=None, options=None, perplexities=None, intervals=(), sessions=1, ranks=1, **record):
    """Write the logs of a finished training of 4 updates and of its evaluations; return its folder.

    Args:
        folder: where to, made where missing.
        experiment: the node of that name in the configuration, None for none.
        options: flat options to add to the configuration or to change in it, such as `common.seed`.
        perplexities: what the evaluations print by subset, by default 20 on valid and 21 on test.
        intervals: what each log interval of one update says, by default a perplexity that falls.
        sessions: how often the configuration is logged: each later session starts at update 2.
        ranks: the number of them, of which the first one's log tells all.
        record: what the model's record says; `router` and `num_experts` are options as well.
    """
    record = {
        "corpus": "a corpus",
        "router": "hash",
        "num_experts": 4,
        **{"parameters_total": 500, "parameters_active": 200},
        **record,
    }
    record |= {"dictionary_fingerprint": "d" * 64, "date": "2026-01-02T03:04:05+00:00", "gpus": [], "processor": "P"}
    record |= {"cores": 2}
    config = {
        "common.seed": 1,
        "optimization.max_update": 4,
        "optimization.max_epoch": 0,
        "optimization.update_freq": [1],
    }
    config |= {"distributed_training.distributed_world_size": ranks, "model._name": "hash_transformer_lm"}
    config |= (
        {f"model.{key}": record[key] for key in ("router", "num_experts")} | {"task.data": "data"} | (options or {})
    )
    config = _nested(config) | ({"experiment": experiment} if experiment else {})
    config["job_logging_cfg"] = {"handlers": {"file": {"filename": str(folder / "rank0.log")}}}
    intervals = intervals or [{"ppl": 60 - 10 * update} for update in range(4)]
    lines = []
    for session in range(sessions):
        start = 2 if session else 0
        loaded = f"Loaded checkpoint checkpoint_last.pt (epoch 1 @ {start} updates)"
        lines += [("fairseq_cli.train", config), ("fairseq.tasks.language_modeling", "dictionary: 104 types")]
        lines += [("fairseq_hash.model", f"model_record | {json.dumps(record)}")]
        lines += [("fairseq.trainer", loaded if session else "No existing checkpoint found checkpoint_last.pt")]
        for update, values in enumerate(intervals[start:], start + 1):
            values = {"ups": 2, "wps": 100, "wall": 30 * update, **values, "num_updates": update}
            lines.append(("train_inner", json.dumps({key: _as_logged(value) for key, value in values.items()})))
            checked = {"valid_ppl": values["ppl"], "valid_num_updates": update}
            lines.append(("valid", json.dumps({key: str(value) for key, value in checked.items()})))
    lines.append(("fairseq_cli.train", "done training in 120.0 seconds"))
    folder.mkdir(parents=True, exist_ok=True)
    _write_log(folder / "rank0.log", 3, lines)
    for rank in range(1, ranks):
        _write_log(folder / f"rank{rank}.log", 3, [("fairseq.distributed.utils", f"initialized host h as rank {rank}")])
    for subset, value in (perplexities or {"valid": 20, "test": 21}).items():
        evaluated = {"common_eval.path": "checkpoint_best.pt", "dataset.gen_subset": subset}
        lines = [("fairseq_cli.eval_lm", _nested(evaluated)), ("fairseq_cli.eval_lm", "Evaluated 900 tokens in 0.1s")]
        lines.append(("fairseq_cli.eval_lm", f"Loss (base 2): 4.0, Perplexity: {value}"))
        _write_log(folder / f"eval-{subset}.log", 4, lines)
    return folder


def _as_logged(value):
    return value if isinstance(value, list) else str(value)


def _nested(flat):
    nested = {}
    for key, value in flat.items():
        *nodes, name = key.split(".")
        place = nested
        for node in nodes:
            place = place.setdefault(node, {})
        place[name] = value
    return nested


def _write_log(path, hour, lines):
    text = [
        f"[2026-01-02 {hour:02}:{n // 60:02}:{n % 60:02},123][{name}][INFO] - {line}"
        for n, (name, line) in enumerate(lines)
    ]
    path.write_text("\n".join(text) + "\n")
