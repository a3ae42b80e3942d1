"""`fairseq-hash study`: run a comparison with a protocol, and report it with verdicts."""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fairseq_hash
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.validators import check_at_least
from fairseq_hash.experiments.names import own_configs
from fairseq_hash.provenance import usable_cores

# Of a training on one core of a CPU: the tenth and the ninetieth percentile of the runs in benchmarks/results/studies.
CORE_GIGAFLOPS = 16, 42


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `study`, and add its arguments."""
    parser.description = (
        "Run a study: tune each model's learning rate on a seed of its own, train each with the final seeds, score "
        "test once, and report perplexity, bits per byte, paired differences and verdicts beside n-gram lines. What is "
        "done is not repeated: the same command continues a study that was stopped."
    )
    add = parser.add_argument
    add("study", nargs="?", metavar="STUDY", help="a YAML file, or the name of one in configs/studies")
    add("--text", type=Path, metavar="DIR", help="folder of train.txt, valid.txt and test.txt, plain or compressed")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="instead of --text: the study's binarized data, made in the folder data of --work elsewhere",
    )
    add("--work", type=Path, default=Path("runs", "studies"), metavar="DIR", help="data and runs; default runs/studies")
    add(
        "--records",
        type=Path,
        metavar="DIR",
        help="folder of the records of its runs, and of its report; studies "
        "beside it lend the records of runs that are the same (default: WORK/records/STUDY)",
    )
    add("--jobs", type=int, metavar="N", help="trainings at once (default: one for each usable core; with --slurm 64)")
    add(
        "--slurm",
        nargs="*",
        metavar="KEY=VALUE",
        help="train in SLURM jobs, with submitit's options of a job, such "
        "as slurm_partition=gpu timeout_min=600 gpus_per_node=1",
    )
    add(
        "--override",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="of every model's configuration, as in fairseq-hydra-train, such as cluster=gpu",
    )
    add("--config-dir", type=Path, default=own_configs(), metavar="DIR", help="default: the project's own")
    add("--quick", action="store_true", help="two rates, two seeds and a few updates: to see whether all of it runs")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--plan", action="store_true", help="print runs, tokens, FLOPs and hours, and train nothing")
    choice.add_argument("--report", action="store_true", help="write the report from the records that are there")
    choice.add_argument("--list", action="store_true", help="print the studies' names and titles")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run, plan or report a study."""
    from fairseq_hash.studies.definition import load_study, quick

    folder = arguments.config_dir / "studies"
    if arguments.list:
        for path in sorted(folder.glob("*.yaml")):
            print(f"{path.stem:<20}{load_study(path).title}")
        return
    if not arguments.study:
        raise UserError("name a study; fairseq-hash study --list has those of the project")
    is_file = arguments.study.endswith((".yaml", ".yml"))
    study = load_study(Path(arguments.study) if is_file else folder / f"{arguments.study}.yaml")
    if arguments.quick:
        study = replace(quick(study), name=f"{study.name}-quick")
    if arguments.text is not None and arguments.data is not None:
        raise UserError("--text and --data both say what the study reads; give one of them")
    if arguments.jobs is not None:
        check_at_least("--jobs", arguments.jobs, 1)
    slurm = None if arguments.slurm is None else _options("--slurm", arguments.slurm)
    jobs = arguments.jobs or (usable_cores() if slurm is None else 64)
    records = arguments.records or arguments.work / "records" / study.name
    if arguments.report:
        _report(study, records)
        return
    fairseq_hash.register()
    from fairseq_hash.studies.study import Setting, open_study

    setting = Setting(
        configs=arguments.config_dir,
        text=arguments.text,
        data=arguments.data,
        work=arguments.work,
        records=records,
        jobs=jobs,
        slurm=slurm,
        overrides=tuple(arguments.override),
    )
    state = open_study(study, setting)
    if arguments.plan:
        print_plan(study, setting, state)
        return
    _train(study, setting, state)
    _report(study, records)


def _train(study: Any, setting: Any, state: Any) -> None:
    from fairseq_hash.studies.progress import StudyProgress
    from fairseq_hash.studies.study import run_study

    # SIGTERM, from a job's end or `kill`, must end the workers as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with StudyProgress(study, state.done, setting.jobs) as progress:
            run_study(study, setting, state, progress)
    except KeyboardInterrupt:
        print("fairseq-hash: interrupted; the same command goes on from the last checkpoints", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def print_plan(study: Any, setting: Any, state: Any) -> None:
    """Print what a study would run and cost, by model.

    Hours are those of the runs that are done, scaled to the others. Before the first one, on CPUs, they are as on the
    machines of the project's own studies.
    """
    from statistics import fmean

    import pandas as pd

    from fairseq_hash.reporting.comparison_table import markdown
    from fairseq_hash.studies.records import FINAL, TUNING
    from fairseq_hash.studies.schedule import tuning_runs

    rows, work_left, runs, tokens = [], 0.0, 0, 0
    for model in study.trained():
        of = state.requests.sizes(model.name)
        done = [run for run in state.done if run.model == model.name]
        finals = sum(run.stage == FINAL for run in done)
        # Rates by which the grid has grown do not stand for others.
        tried = sum(run.stage == TUNING and run.learning_rate in study.learning_rates for run in done)
        left = len(study.seeds) - finals + max(0, tuning_runs(study) - tried)
        work_left += left * of.training_flops
        rows.append(
            {
                "Model": model.name,
                "Parameters": f"{of.total:,}",
                "Active": f"{of.active:,}",
                "FLOPs a run": f"{of.training_flops:.3g}",
                "Tokens an update": f"{of.tokens_per_update:,}",
                "Updates": f"{of.updates:,}",
                "Done": f"{len(done)}",
                "Left": f"{left}",
            }
        )
        runs, tokens = runs + left, tokens + left * of.tokens_per_update * of.updates
    print(f"{study.title}\n{study.question.strip()}\n\n{markdown(pd.DataFrame(rows))}")
    speeds = [
        record.tokens * record.flops_per_token / record.seconds for record in state.done.values() if record.seconds
    ]
    print(f"\nleft: {runs} runs, or more where a grid of rates grows; {tokens:,} tokens, {work_left:.3g} FLOPs")
    if speeds:
        hours = work_left / fmean(speeds) / 3600 / setting.jobs
        print(f"about {hours:.1f} hours with {setting.jobs} at once, as fast as the {len(speeds)} runs that are done")
    elif setting.slurm is None and all(state.requests.composed(one.name).config.common.cpu for one in study.trained()):
        slow, fast = CORE_GIGAFLOPS
        threads = state.requests.places.threads
        least, most = (work_left / (speed * 1e9 * threads * setting.jobs) / 3600 for speed in (fast, slow))
        print(
            f"about {least:.2g} to {most:.2g} hours with {setting.jobs} at once, if each of a run's {threads} threads "
            f"makes {slow} to {fast} GFLOP/s, as one alone did in the project's own studies"
        )
    else:
        print("hours: not known before a run is done")


def _report(study: Any, records: Path) -> None:
    from fairseq_hash.studies.records import read_facts, read_records
    from fairseq_hash.studies.report import study_summary, write_study_report
    from fairseq_hash.studies.schedule import done_of

    path = records / "text.json"
    if not path.is_file():
        raise UserError(f"{records} has no record of the study's text; run the study first, or give --records")
    facts, done = read_facts(path), done_of(study, read_records(records / "runs").values())
    print(study_summary(study, facts, done))
    for written in write_study_report(study, facts, done, records):
        print(f"wrote {written}")


def _options(flag: str, words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{flag} {word} is no KEY=VALUE; give an option of submitit, such as timeout_min=60")
        options[key] = int(value) if value.isdigit() else value
    return options
