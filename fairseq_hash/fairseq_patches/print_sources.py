"""Print the table `SOURCES` of `upstream` for the installed fairseq."""

from pkgutil import resolve_name

from fairseq_hash.fairseq_patches.registry import overrides
from fairseq_hash.fairseq_patches.upstream import is_fairseqs, source_hash


def main() -> None:
    """Print the table of the installed fairseq."""
    print("SOURCES: dict[str, str] = {")
    for target, owner, name in sorted({(entry.target, entry.owner, entry.name) for entry in overrides()}):
        original = getattr(resolve_name(owner), name)
        if is_fairseqs(original):
            print(f'    "{target}": "{source_hash(original)}",')
    print("}")


if __name__ == "__main__":
    main()
