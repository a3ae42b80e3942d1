"""Rounds of fuzzing: a reader gets mutated files, and may accept them or refuse them in one line; all else is a fault.

A fault is any error but `UserError`, a message that is not one printable line, a reading of more than `SECONDS` of a
core, a demand for more memory than `ROOM`, even if its error is caught, and a command, a process or a connection that
is begun.
"""

import contextlib
import faulthandler
import math
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzz_mutations import Seed, files_of, mutate

from fairseq_hash.core.errors import UserError

SECONDS = 5.0  # of a core: on a busy machine a clock on the wall says little
WAIT = 120.0  # seconds of the clock, for a reading that waits for something
ROOM = 1 << 30  # bytes of addresses above those that the process has before the first reading
LONGEST = 2000  # characters of a message
WATCHED = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect")
NO_MEMORY = ("allocate memory", "bad_alloc", "out of memory", "Unable to allocate")

_begun: "list[str] | None" = None  # what was begun during a reading; None outside of one


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        name: of the reader.
        seeds: makes valid files of different kinds.
        read: reads the files in a folder, and uses what it has read as far as its callers do.
        hostile: files that nobody may accept.
        share: the share of a round's inputs that it gets: less for a reader that is slow.
    """

    name: str
    seeds: Callable[[], Sequence[Seed]]
    read: Callable[[Path], object]
    hostile: Callable[[], Sequence[Seed]] = lambda: ()
    share: float = 1.0


@dataclass
class Fault:
    """A kind of fault: how often it came, and the number of the first input that showed it."""

    what: str
    first: int
    trace: str
    times: int = 1


@dataclass
class Round:
    """What came of the inputs of one reader. Memory is the peak above what the process had before."""

    reader: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    faults: dict[str, Fault] = field(default_factory=dict)
    slowest_ms: float = 0.0
    peak_bytes: "int | None" = None

    @property
    def faulty(self) -> int:
        """The number of inputs that showed a fault."""
        return sum(fault.times for fault in self.faults.values())


class TooLongError(BaseException):
    """A reading took too long; no `except Exception` catches it."""


def _too_long(number: int, frame: object) -> None:
    raise TooLongError(f"more than {SECONDS:g} s of a core, or {WAIT:g} s in all")


def _arm(of_core: float, of_clock: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, of_core)
    signal.setitimer(signal.ITIMER_REAL, of_clock)


def _watch(event: str, arguments: tuple) -> None:
    if _begun is not None and event in WATCHED:
        _begun.append(event)


_is_watched = False


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Limit time and memory of readings in this process, and see what they begin."""
    global _is_watched
    if not _is_watched:
        sys.addaudithook(_watch)  # for as long as the process lives
        _is_watched = True
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    before_signals = {number: signal.signal(number, _too_long) for number in (signal.SIGALRM, signal.SIGPROF)}
    try:
        yield
    finally:
        _arm(0, 0)
        for number, handler in before_signals.items():
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(reader: Reader, folder: Path) -> tuple[str, str, str]:
    """Read a folder; return `accepted`, `refused` or `fault`, a kind or a message, and a trace of a fault."""
    global _begun
    _begun = []
    faulthandler.dump_traceback_later(2 * WAIT, exit=True)  # where a library's own code never comes back
    _arm(SECONDS, WAIT)
    error: BaseException | None = None
    try:
        reader.read(folder)
    except (Exception, TooLongError, SystemExit) as caught:
        error = caught
    finally:
        _arm(0, 0)
        begun, _begun = _begun, None
    if begun:
        return "fault", f"began {begun[0]}", ""
    return _judged(error) if error is not None else ("accepted", "", "")


def _judged(error: BaseException) -> tuple[str, str, str]:
    if isinstance(error, SystemExit) and isinstance(error.code, str):
        error = UserError(error.code) if error.code.isprintable() else error  # the last line of a fairseq command
    trace = "".join(traceback.format_exception(error, limit=-8))[-3000:]
    if not isinstance(error, UserError):
        return "fault", _kind(error), trace
    message = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or any(words in str(cause) for words in NO_MEMORY):
            return "fault", f"asked for too much memory: {_kind(cause)}", trace
        cause = cause.__cause__ or cause.__context__
    if not message.isprintable() or not message.strip() or len(message) > LONGEST:
        return "fault", f"a message that is no line: {_kind(error)}", repr(message[:300])
    return "refused", message, ""


def _kind(error: BaseException) -> str:
    """Return the error's type and the innermost place in this project: the same for one cause."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if "/fairseq_hash/" in one.filename or "/data_prep/" in one.filename]
    place = own[-1] if own else frames[-1] if frames else None
    where = f"{Path(place.filename).name}:{place.lineno} {place.name}" if place else "nowhere"
    return f"{type(error).__name__} in {where}"


def input_of(reader: Reader, seeds: Sequence[Seed], seed: int, number: int) -> dict[str, bytes]:
    """Return the files of one input: by reader, seed and number the same in every run."""
    generator = random.Random(f"{seed} {reader.name} {number}")
    return mutate(generator.choice(seeds), generator)


def play(
    reader: Reader,
    folder: Path,
    inputs: int,
    seed: int,
    on_input: Callable[[Round], None] = lambda result: None,
    first: int = 0,
) -> Round:
    """Give a reader its valid files, its hostile ones, and then mutated ones; return what came of the mutated ones.

    Valid files that are refused and hostile ones that are accepted are faults, too.
    """
    result = Round(reader.name)
    seeds, hostile = list(reader.seeds()), list(reader.hostile())
    with limits():
        for number, given in enumerate((*seeds, *hostile)):
            wanted = "accepted" if number < len(seeds) else "refused"
            found, what, trace = _one(reader, folder, files_of(given))
            if found != wanted:
                _add(result, what if found == "fault" else f"unmutated file {found}: {what[:200]}", -1 - number, trace)
        for number in range(first, first + math.ceil(inputs * reader.share)):
            files = input_of(reader, [*seeds, *hostile], seed, number)
            start = time.process_time()
            found, what, trace = _one(reader, folder, files)
            result.slowest_ms = max(result.slowest_ms, 1000 * (time.process_time() - start))
            result.inputs += 1
            result.accepted += found == "accepted"
            result.refused += found == "refused"
            if found == "fault":
                _add(result, what, number, trace)
            on_input(result)
    return result


def _add(result: Round, what: str, number: int, trace: str) -> None:
    if what in result.faults:
        result.faults[what].times += 1
    else:
        result.faults[what] = Fault(what, number, trace)


def _one(reader: Reader, folder: Path, files: dict[str, bytes]) -> tuple[str, str, str]:
    """Read files in a fresh folder, which is gone afterwards."""
    place = folder / "read"
    try:
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        return outcome(reader, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
