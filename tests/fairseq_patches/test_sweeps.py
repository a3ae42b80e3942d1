"""The runs of a sweep are what each of them is alone, also where one process does several."""

import pytest
from forked import run_python
from hydra_configs import NAME, logged, needs_current_hydra, write_configs
from plugin import USER_DIR

pytestmark = needs_current_hydra

UPDATES = 6
VALIDATED = ("dataset.disable_validation=false", "dataset.validate_interval_updates=3")


def hydra_train(folder, *words):
    """Run `fairseq-hydra-train` in a folder."""
    words = ["-m", "fairseq_cli.hydra_train", *words]
    done = run_python(words, cwd=folder, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]


def test_runs_that_share_a_process_are_as_runs_alone(data, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install '.[sweeps]'")
    chosen = (*write_configs(tmp_path, data, UPDATES), *VALIDATED)
    # One process for two runs, and the last one is the worst: it is not better than the one before.
    rates = "optimization.lr=[0.01],[0.0001]"
    # The folder is that of the project's own experiments.
    path = tmp_path / "my configs" / f"{NAME}.yaml"
    lines = [line for line in path.open() if not line.startswith("  sweep:")]
    path.write_text("".join(lines).replace("common: {", f'common: {{user_dir: "{USER_DIR}", '))
    hydra_train(tmp_path, "-m", *chosen, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", rates)
    hydra_train(tmp_path, *chosen, "optimization.lr=[0.0001]", "hydra.run.dir=alone")
    runs = sorted((tmp_path / "runs" / NAME).glob("*/seed*"))
    assert len(runs) == 2
    for run in runs:
        assert len(logged(run / "rank0.log")) == UPDATES
        assert (run / "checkpoint_best.pt").is_file()
        assert list(run.glob("board/train_inner/*")), "curves of its own"
    [last] = (run for run in runs if "0.0001" in str(run))
    assert logged(last / "rank0.log") == logged(tmp_path / "alone" / "rank0.log")
