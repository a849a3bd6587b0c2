"""Mutate exports and runs, load them, and count what comes out.

``python -m tests.fuzz --count 10000 --seed 0`` mutates an export as many times, and a run a fifth
as often. It prints a table, and one line for each mutation with a bad outcome or with ``bound``
(see `worker.Trial`); ``--kind run --number 17`` repeats the one of that number.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

# A file that lacks its name is not looked for at a hub, which would be tried again and again.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does

from fuzz.worker import OUTCOMES, READERS, Fuzzer, Trial  # noqa: E402


def table(trials: list[Trial]) -> str:
    """Count the outcomes by reader, plain and signed mutations apart."""
    lines = [f"{'':27}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES)]
    for reader, signed in sorted({(trial.reader, trial.mutation.signed) for trial in trials}):
        counts = Counter(
            t.outcome for t in trials if (t.reader, t.mutation.signed) == (reader, signed)
        )
        title = f"{reader}, {'signed' if signed else 'plain'}"
        lines.append(f"{title:27}" + "".join(f"{counts[outcome]:>10}" for outcome in OUTCOMES))
    return "\n".join(lines)


def attempt(kind: str, numbers: Sequence[int], options: argparse.Namespace) -> list[Trial]:
    """Try some numbers in a directory of their own; print what is bad at once."""
    trials = []
    with tempfile.TemporaryDirectory() as directory:
        for trial in Fuzzer(Path(directory)).trials(kind, numbers, options.seed):
            trials.append(trial)
            is_told = trial.is_bad() or trial.outcome == "bound"
            if is_told or options.all or options.number is not None:
                print(trial, flush=True)
    return trials


def main() -> int:
    """Return 1 if anything bad came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="mutations of the export")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=tuple(READERS), help="only these")
    parser.add_argument("--number", type=int, help="only this one, whatever comes out")
    parser.add_argument("--all", action="store_true", help="print every trial")
    parser.add_argument("--processes", type=int, default=1, help="that share the numbers")
    options = parser.parse_args()
    trials: list[Trial] = []
    for kind in (options.kind,) if options.kind else READERS:
        count = options.count if kind == "export" else -(-options.count // 5)
        numbers = range(count) if options.number is None else (options.number,)
        shares = [numbers[index :: options.processes] for index in range(options.processes)]
        with ProcessPoolExecutor(options.processes, get_context("fork")) as pool:
            for share in pool.map(partial(attempt, kind, options=options), shares):
                trials += share
    print(table(trials))
    return int(any(trial.is_bad() for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
