"""Kill commands before and after every rename and deletion and at random moments; start them twice.

``python -m tests.kills`` runs each command of the chain in a process of its own on a tiny pipeline,
kills it, runs the same command again, and compares what then lies in the run with what an
uninterrupted command left, byte for byte. Then it starts each command twice at once. It prints one
line for each command.
"""

import argparse
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

from msfp_cli.commands.app import app  # noqa: E402
from msfp_cli.files import directories  # noqa: E402
from tiny_pipelines import save_tiny  # noqa: E402

Words = tuple[str, ...]
Moment = Callable[[], None]

_RECORD = ("--num-images", "4", "--steps", "2", "--batch-size", "2")
_SEARCH = ("--rounding", "nearest", "--lift", "0", "--formats", "e2m1,ue2m2")
_TRAIN = ("--steps", "2", "--batch-size", "2", "--rank", "2", "--num-processes", "1")
_DRAW = ("--num-images", "2", "--steps", "2", "--batch-size", "2", "--num-trajectories", "1")
_MEASURE = (*_DRAW, "--no-cost", "--no-layers")
_FINISHED = "exists already"  # a command says so that finds its result whole


def commands(model: Path, run: Path) -> dict[str, Words]:
    """Return the commands in the order of the chain."""
    inside = ("--run", str(run))
    calibrate = ("calibrate", str(model), *_RECORD, *_SEARCH, *inside)
    evaluate = ("evaluate", *_MEASURE, *inside)
    sample = ("sample", "--steps", "2", *inside)
    quantize = ("quantize", str(model), "--out", str(run / "quantized"))
    return {
        "calibrate": calibrate,
        "calibrate --overwrite": (*calibrate, "--seed", "1", "--overwrite"),
        "finetune": ("finetune", *_TRAIN, *inside),
        "finetune --restart": ("finetune", *_TRAIN, "--seed", "1", "--restart", *inside),
        "export": ("export", *inside),
        "export --overwrite": ("export", "--calibrated", "--overwrite", *inside),
        "sample": sample,
        "sample --overwrite": (*sample, "--out", str(run / "samples" / "001"), "--overwrite"),
        "evaluate": evaluate,
        "evaluate --overwrite": (*evaluate, "--seed", "9", "--overwrite"),
        "report": ("report", *inside),
        "report --overwrite": ("report", "--overwrite", *inside),
        "quantize": quantize,
        "quantize --overwrite": (*quantize, "--weights", "3", "--overwrite"),
    }


@dataclass
class Outcome:
    """What came of a command.

    Arguments:
        trials: what is wrong after each kill, an empty text where nothing is.
        pairs: likewise after each start of two at once.
    """

    trials: list[str] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)

    def wrong(self) -> list[str]:
        """Return what is wrong."""
        return [text for text in (*self.trials, *self.pairs) if text]


@dataclass(frozen=True)
class Ending:
    """How a process ended: its exit code, negative if a signal ended it, and what it said."""

    code: int
    says: str

    @property
    def is_whole(self) -> bool:
        """Whether its work is done, by it or before."""
        return self.code == 0 or (self.code > 0 and _FINISHED in self.says)

    @property
    def is_one_line(self) -> bool:
        """Whether it failed in one line that is not about a fault of msfp.

        What it had logged until then comes before.
        """
        lines = self.says.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        is_line = bool(errors) and errors == lines[-1:] and "report it" not in self.says
        return self.code in (1, 2) and is_line


def start(words: Words, arm: Moment = lambda: None) -> Callable[[], Ending]:
    """Run the command line in a copy of this process.

    Arguments:
        arm: called there before the command.

    Returns:
        A function that waits until it has ended.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            arm()
            result = CliRunner().invoke(app, words)
            os.write(write, result.stderr.encode() if result.exit_code else b"")
            os._exit(result.exit_code)
        finally:
            os._exit(99)
    os.close(write)

    def wait() -> Ending:
        with os.fdopen(read) as pipe:
            says = pipe.read().strip()
        return Ending(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), says)

    return wait


class Names:
    """The moments before and after each rename and deletion of a command, in their order."""

    def __init__(self) -> None:
        self._count = mmap.mmap(-1, 8)  # shared with the process that counts

    @property
    def count(self) -> int:
        """How many there were when they were last watched."""
        return int.from_bytes(self._count[:8], "little")

    def watch(self, kill_at: int | None = None) -> None:
        """Count the moments of this process, and kill it at one of them."""
        self._count[:8] = bytes(8)
        for owner, name in (
            (os, "rename"),
            (os, "replace"),
            (os, "unlink"),
            (os, "rmdir"),
            (directories, "exchange"),
        ):
            function = getattr(owner, name)
            setattr(owner, name, _between(function, partial(self._next, kill_at)))

    def _next(self, kill_at: int | None) -> None:
        if self.count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._count[:8] = (self.count + 1).to_bytes(8, "little")


def _between(function: Callable[..., object], moment: Moment) -> Callable[..., object]:
    def wrapper(*arguments: object, **options: object) -> object:
        moment()
        result = function(*arguments, **options)
        moment()
        return result

    return wrapper


def watch_time(seconds: float) -> None:
    """Kill this process after a while."""

    def kill() -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def files_of(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory, hidden ones too."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


class Harness:
    """A run on a tiny pipeline, brought to where a command begins and compared with where it ends.

    Arguments:
        place: an empty directory to work in.
    """

    def __init__(self, place: Path) -> None:
        save_tiny("DDIMPipeline", place / "model")
        self.run = place / "run"
        self._before = place / "before"
        self._done = place / "done"
        self.commands = commands(place / "model", self.run)
        self._words: Words = ()
        self._expected: dict[str, bytes] = {}
        self.names = Names()
        self.seconds = 0.0

    def begin(self, title: str) -> None:
        """Run a command without interruption, and remember what was there before and after."""
        self._words = self.commands[title]
        self.run.mkdir(exist_ok=True)
        _copy(self.run, self._before)
        began = time.monotonic()
        ending = start(self._words, self.names.watch)()
        assert ending.code == 0, f"{title} ends with {ending}"
        self.seconds = time.monotonic() - began
        _copy(self.run, self._done)
        self._expected = files_of(self.run)

    def end(self) -> None:
        """Leave the run as the uninterrupted command did."""
        _copy(self._done, self.run)

    def kill(self, arm: Moment) -> str | None:
        """Kill the command and run it again; say what is wrong then, None if it was not killed."""
        _copy(self._before, self.run)
        if start(self._words, arm)().code >= 0:
            return None
        ending = start(self._words)()
        return self._difference() if ending.is_whole else f"the same command ends with {ending}"

    def pair(self) -> str:
        """Start the command twice at once; say what is wrong then."""
        _copy(self._before, self.run)
        both = [start(self._words), start(self._words)]
        failed = [ending for ending in (wait() for wait in both) if ending.code]
        if len(failed) == 2 or not all(ending.is_one_line for ending in failed):
            return f"they end with {failed}"
        return self._difference()

    def trouble(
        self, arm: Moment, around: Callable[[Path], AbstractContextManager[None]] = nullcontext
    ) -> str | None:
        """Run the command in trouble and again without; say what is wrong, None if nothing failed.

        Arguments:
            arm: makes the trouble in the command's process.
            around: makes it for the run, and takes it away.
        """
        _copy(self._before, self.run)
        before = files_of(self.run)
        with around(self.run):
            ending = start(self._words, arm)()
        if ending.code == 0:
            return self._difference() or None
        if not ending.is_one_line:
            return f"in trouble it ends with {ending}"
        kept = files_of(self.run)
        lost = [name for name, content in before.items() if kept.get(name) != content]
        if lost and not {"--overwrite", "--restart"} & set(self._words):
            return f"{lost[0]} is lost"
        ending = start(self._words)()
        return self._difference() if ending.code == 0 else f"afterwards it ends with {ending}"

    def _difference(self) -> str:
        """Name the first file that differs from what an uninterrupted command leaves.

        A sample that was finished before is not taken for this one's, which gets a new directory.
        """
        files = files_of(self.run)
        names = sorted(files.keys() | self._expected.keys())
        for name in names:
            is_another_sample = self._words[0] == "sample" and name.startswith("samples/002/")
            if files.get(name) != self._expected.get(name) and not is_another_sample:
                return f"{name} differs"
        return ""


def _copy(source: Path, target: Path) -> None:
    """Make a directory a copy of another."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def kill_everywhere(harness: Harness, at_names: int | None, randomly: int) -> Iterator[str]:
    """Kill the command that was begun; yield what is wrong after each kill.

    Arguments:
        at_names: how many of the moments before and after a rename or a deletion, from the first
            to the last at equal distances; None takes all.
        randomly: kills at random moments.
    """
    count = harness.names.count
    chosen = count if at_names is None else min(count, at_names)
    arms: list[Moment] = []
    for number in range(chosen):
        moment = number * (count - 1) // max(1, chosen - 1)
        arms.append(partial(harness.names.watch, moment))
    draw = random.Random(0)
    for _ in range(randomly):
        arms.append(partial(watch_time, draw.uniform(0, harness.seconds)))
    for arm in arms:
        wrong = harness.kill(arm)
        if wrong is not None:  # a command may end before its time
            yield wrong


def main() -> int:
    """Print for each command how many kills and pairs went well; return 1 if any did not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, help="of all commands. Default: at all names")
    parser.add_argument("--random", type=int, default=4, help="kills at random, of each command")
    parser.add_argument("--pairs", type=int, default=2, help="starts of two, of each command")
    options = parser.parse_args()
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as place:
        harness = Harness(Path(place))
        share = None if options.trials is None else -(-options.trials // len(harness.commands))
        for title in harness.commands:
            harness.begin(title)
            at_names = None if share is None else max(0, share - options.random)
            trials = list(kill_everywhere(harness, at_names, options.random))
            pairs = [harness.pair() for _ in range(options.pairs)]
            outcomes[title] = Outcome(trials, pairs)
            harness.end()
            print(_line(title, [outcomes[title]]), flush=True)
    print(_line("all", list(outcomes.values())))
    return int(any(outcome.wrong() for outcome in outcomes.values()))


def _line(title: str, outcomes: list[Outcome]) -> str:
    """Return the counts of some commands, and what went wrong."""
    trials = [text for outcome in outcomes for text in outcome.trials]
    pairs = [text for outcome in outcomes for text in outcome.pairs]
    counts = (trials.count(""), len(trials), pairs.count(""), len(pairs))
    text = "{:22} {:4} of {:4} kills healed, {:3} of {:3} pairs well".format(title, *counts)
    return "; ".join([text, *sorted({text for text in (*trials, *pairs) if text})])


if __name__ == "__main__":
    sys.exit(main())
