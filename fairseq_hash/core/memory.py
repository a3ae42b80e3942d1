"""Whether this machine can hold what an option asks for: said before anything of it is allocated."""

import os

from fairseq_hash.core.errors import UserError

UNITS = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6))


def machine_bytes() -> float:
    """Return the bytes of memory of this machine; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def check_fits(wanted: float, what: str, remedy: str) -> None:
    """Raise `UserError` where so many bytes are more than this machine has, all processes together."""
    if wanted > machine_bytes():
        raise UserError(
            f"{what} would take {in_words(wanted)} of memory, this machine has {in_words(machine_bytes())}; {remedy}"
        )


def in_words(number: float) -> str:
    """Return a number of bytes for people: 1,600 GB; 12.8 TB."""
    for unit, size in UNITS:
        if number >= size:
            return f"{number / size:,.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:,.0f} bytes"
