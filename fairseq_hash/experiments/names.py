"""The names of experiments and their folder; needs no fairseq."""

from pathlib import Path

# Folders of option groups, and of studies. A file in another folder is an experiment, unless its name begins with an
# underscore.
GROUPS = ("data", "size", "router", "training", "cluster", "studies")


def own_configs() -> Path:
    """Return the folder of the configurations: inside an installed package, but beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def experiment_names(config_dir: Path) -> list[str]:
    """Return the names of all experiments under a folder of configurations, sorted."""
    paths = (path for path in config_dir.glob("*/*.yaml") if path.parent.name not in GROUPS)
    return sorted(f"{path.parent.name}/{path.stem}" for path in paths if not path.stem.startswith("_"))
