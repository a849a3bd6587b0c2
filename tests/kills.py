"""Kill commands before and after every rename and deletion, and at random moments.

``python tests/kills.py --trials 200`` runs each command of the chain in a process of its own on a
tiny pipeline, kills it, runs the same command again, and compares what then lies in the run with
what an uninterrupted command left, byte for byte. It prints one line for each command.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from typer.testing import CliRunner

from msfp_cli.commands.app import app
from msfp_cli.files import directories
from tiny_pipelines import save_tiny

_OPTIONS = ("--num-images", "4", "--steps", "2", "--batch-size", "2")
_TRAIN = ("--steps", "2", "--batch-size", "2", "--rank", "2", "--num-processes", "1")
_MOMENT = Callable[[], None]


def commands(model: Path) -> dict[str, tuple[str, ...]]:
    """Return the commands in the order of the chain."""
    return {
        "calibrate": ("calibrate", str(model), *_OPTIONS),
        "calibrate --overwrite": ("calibrate", str(model), *_OPTIONS, "--seed", "1", "--overwrite"),
        "finetune": ("finetune", *_TRAIN),
        "export": ("export",),
        "export --overwrite": ("export", "--calibrated", "--overwrite"),
        "sample": ("sample", "--steps", "2"),
    }


def in_child(work: Callable[[], int]) -> int:
    """Run a function in a copy of this process; return its exit code, negative if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(run: Path, words: tuple[str, ...]) -> int:
    """Run the command line; one that finds its result finished has ended well before."""
    result = CliRunner().invoke(app, [*words, "--run", str(run)])
    if result.exit_code and "exists already" not in result.stderr:
        os.write(2, result.stderr.encode())
        return result.exit_code
    return 0


def watch_names(at: int) -> None:
    """Kill this process at a number of a moment: two for each rename or deletion."""
    count = iter(range(1_000_000))

    def moment() -> None:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    for owner, name in (
        (os, "rename"),
        (os, "replace"),
        (os, "unlink"),
        (os, "rmdir"),
        (directories, "exchange"),
    ):
        setattr(owner, name, _between(getattr(owner, name), moment))


def _between(function: Callable[..., object], moment: _MOMENT) -> Callable[..., object]:
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


def trial(
    words: tuple[str, ...], before: Path, run: Path, expected: dict[str, bytes], arm: _MOMENT
) -> tuple[bool, str]:
    """Kill a command and run it again; say whether it was killed, and what is wrong then."""
    shutil.rmtree(run, ignore_errors=True)
    if before.exists():
        shutil.copytree(before, run)

    def killed_command() -> int:
        arm()
        return command(run, words)

    killed = in_child(killed_command) < 0
    code = in_child(lambda: command(run, words)) if killed else 0
    if code != 0:
        return killed, f"the same command ends with {code}"
    files = files_of(run)
    differing = sorted(
        name for name in files.keys() | expected if files.get(name) != expected.get(name)
    )
    if killed and words[0] == "sample":  # one that was finished before is not taken for this one's
        differing = [name for name in differing if not name.startswith("samples/002/")]
    return killed, f"{differing[0]} differs" if differing else ""


def kill_everywhere(place: Path, trials: int, only: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Return for each command what went wrong in its trials, an empty text where nothing did.

    Arguments:
        trials: for each command, half at renames and deletions (all, if there are fewer), half at
            random moments.
    """
    model = save_tiny("DDIMPipeline", place / "model") or place / "model"
    run = place / "run"
    outcomes: dict[str, list[str]] = {}
    draw = random.Random(0)
    for title, words in commands(model).items():
        before = place / "before"
        shutil.rmtree(before, ignore_errors=True)
        if run.exists():
            shutil.copytree(run, before)
        start = time.monotonic()
        code = in_child(partial(command, run, words))
        assert code == 0, f"{title} ends with {code}"
        seconds = time.monotonic() - start
        done = place / "done"
        shutil.rmtree(done, ignore_errors=True)
        shutil.copytree(run, done)
        expected = files_of(run)
        results = outcomes.setdefault(title, [])
        for number in range(trials if not only or title in only else 0):
            late = draw.uniform(0, seconds)
            arm = (
                partial(watch_names, number // 2) if number % 2 == 0 else partial(watch_time, late)
            )
            killed, wrong = trial(words, before, run, expected, arm)
            if killed or wrong:
                results.append(wrong)
        shutil.rmtree(run)
        shutil.copytree(done, run)
    return outcomes


def main() -> None:
    """Print how many trials of each command went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="of all commands together")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        each = max(1, arguments.trials // 6)
        outcomes = kill_everywhere(Path(place), each)
    for title, results in outcomes.items():
        wrong = [text for text in results if text]
        print(f"{title:22} {len(results) - len(wrong):4} of {len(results):4} kills healed", *wrong)
    sys.exit(any(text for results in outcomes.values() for text in results))


if __name__ == "__main__":
    main()
