"""Load what a mutation has made, in a process of its own with bounded memory and time."""

import faulthandler
import gc
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from conftest import CHEAP, TWO_PICTURES, chain, finetune
from fuzz.mutations import CANARY, Mutation, mutate
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.errors import MsfpError
from msfp_cli.files.documents import digest
from msfp_cli.finetuning.result import load_finetunings
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run
from msfp_cli.status import status_of
from tiny_pipelines import save_smallest

CPU_SECONDS = 60  # of the processor's time: other processes may keep the machine busy
SECONDS = 900  # for what waits and does nothing
MEMORY = 2 << 30  # beyond what the process has when it begins
BAD = ("crash", "hang", "raw", "code")
OUTCOMES = ("refused", "equal", "different", "stock", "bound", *BAD)
_RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
_HARMLESS = ("torch._utils", "collections", "torch")  # what a checkpoint of tensors names

_BATCH = 400  # trials in one process, while nothing ends it
_SAYS = "\x1e"  # begins each line of ours; libraries write of their troubles between them
_NO_MEMORY = ("memory allocation of", "bad_alloc", "out of memory", "Cannot allocate memory")

Reader = Callable[[Path], str]  # returns a digest of what it has read
Write = Callable[[str], object]  # writes a line


@dataclass(frozen=True)
class Trial:
    """What came of one mutation with one reader.

    Arguments:
        outcome: one of `OUTCOMES`. ``stock`` is an error of diffusers itself, about a component
            that is not quantized. ``bound`` is its own loader that asks for more memory or time
            than a trial has, because a config of such a component says so, while no code of msfp
            is at work. ``raw`` is an error that msfp should have explained.
    """

    number: int
    mutation: Mutation
    reader: str
    outcome: str
    detail: str

    def is_bad(self) -> bool:
        """Whether it must not happen: also damage that nobody has noticed."""
        silent = self.outcome == "different" and not self.mutation.signed and self._is_covered()
        return self.outcome in BAD or silent

    def _is_covered(self) -> bool:
        """Whether the reader has to notice damage of this file.

        The stock loader knows of denoisers only. A part of a run may be absent.
        """
        if self.reader == "MSFPPipeline":
            return True
        if self.reader == "DiffusionPipeline":
            return self.mutation.file.startswith("unet/")
        return not self.mutation.gone

    def __str__(self) -> str:
        words = (self.number, self.outcome, self.reader, self.mutation, self.detail)
        return " | ".join(map(str, words))


class _CallError(Exception):
    """An error while a pipeline was called, not while it was loaded."""


def _picture(pipe: Any) -> str:  # noqa: ANN401 (either kind of pipeline)
    """Return a digest of one picture."""
    try:
        generator = torch.Generator().manual_seed(0)
        images = pipe("a cat", num_inference_steps=2, generator=generator, output_type="pt").images
    except Exception as error:
        raise _CallError from error
    return digest({"images": images.float()})


def _ours(directory: Path) -> str:
    return _picture(MSFPPipeline.from_pretrained(directory, device="cpu"))


def _stock(directory: Path) -> str:
    pipe = DiffusionPipeline.from_pretrained(str(directory))
    pipe.set_progress_bar_config(disable=True)
    return _picture(pipe)


def _calibration(directory: Path) -> str:
    calibration = Calibration.load(Run(directory).calibration)
    return calibration.identity()


def _finetunings(directory: Path) -> str:
    run = Run(directory)
    states = load_finetunings(run, Calibration.load(run.calibration))
    return str([(name, state, digest(state.tensors)) for name, state in states.items()])


def _status(directory: Path) -> str:
    text = json.dumps(status_of(Run(directory)).to_json())
    return text.replace(str(directory), "RUN")


def _recording(directory: Path) -> str:
    recording = Recording(Run(directory).recording)
    calls = [
        (call.component, call.timestep, str(call.arguments), digest({"output": call.output}))
        for call in recording.calls()
    ]
    timesteps = [recording.timesteps(index, "unet") for index in range(recording.num_shards)]
    return str(
        (calls, timesteps, recording.num_calls(), recording.factors("unet"), recording.clocks())
    )


READERS: dict[str, dict[str, Reader]] = {
    "export": {"MSFPPipeline": _ours, "DiffusionPipeline": _stock},
    "run": {
        "Calibration": _calibration,
        "load_finetunings": _finetunings,
        "status_of": _status,
        "Recording": _recording,
    },
}


class Fuzzer:
    """A tiny run and its export, mutated one number at a time.

    This process only imports: whatever starts threads runs in copies of it, which can then be made
    at any time without a lock that nobody would open.
    """

    def __init__(self, directory: Path) -> None:
        """Calibrate, fine-tune and export the smallest text-to-image pipeline."""
        self._scratch = directory / "mutated"
        self._originals = {"export": directory / "export", "run": directory / "run"}
        answer = in_child(lambda write: _make(directory))
        assert answer.code == 0, answer.words

    def trials(self, kind: str, numbers: Iterable[int], seed: int) -> Iterator[Trial]:
        """Make mutations of an export or of a run, and try all readers on each."""
        tasks = [(number, name) for number in numbers for name in READERS[kind]]
        work = partial(self._attempt_all, kind, seed=seed)
        yield from attempts(tasks, work)

    def _attempt_all(
        self, kind: str, tasks: list[tuple[int, str]], write: Write, seed: int
    ) -> None:
        original = self._originals[kind]
        readers = READERS[kind]
        expected = {name: readers[name](original) for name in {name for _, name in tasks}}
        for number, name in tasks:
            shutil.rmtree(self._scratch, ignore_errors=True)
            shutil.copytree(original, self._scratch)
            write(json.dumps(asdict(mutate(self._scratch, number, seed))))
            _forget_earlier_trials()
            with bounded_time():
                outcome = outcome_of(readers[name], self._scratch, expected[name])
            write(outcome)


def attempts(
    tasks: list[tuple[int, str]], work: Callable[[list[tuple[int, str]], Write], None]
) -> Iterator[Trial]:
    """Yield a trial for each task; several share a process, until one of them ends it.

    Arguments:
        work: writes two lines for each task: its mutation, before it begins, and its outcome.
    """
    while tasks:
        answer = in_child(partial(work, tasks[:_BATCH]))
        said = answer.words.split(_SAYS)[1:]
        assert said, f"nothing was tried: exit {answer.code}, {answer.words}"
        if len(said) % 2:
            said.append(_death(tasks[len(said) // 2][1], answer.code, said[-1]))
        count = len(said) // 2
        for task, mutation, outcome in zip(tasks[:count], said[::2], said[1::2], strict=True):
            yield _trial(task, mutation.partition("\n")[0], outcome.partition("\n")[0])
        tasks = tasks[count:]


def _trial(task: tuple[int, str], mutation: str, words: str) -> Trial:
    outcome, _, detail = words.partition(" ")
    number, reader = task
    return Trial(number, Mutation(**json.loads(mutation)), reader, outcome, detail)


def _death(reader: str, code: int, words: str) -> str:
    """Return the outcome of a trial that ended its process.

    Arguments:
        words: what libraries wrote, and `faulthandler` of the place.
    """
    is_late = code in (-signal.SIGPROF, -signal.SIGALRM)
    outcome = "hang" if is_late else "crash"
    frames = words.rpartition("(most recent call first)")[2]
    place = next((line.strip() for line in frames.splitlines() if "File" in line), "")
    asks_too_much = code == -signal.SIGPROF or any(text in words for text in _NO_MEMORY)
    is_stock = READERS["export"].get(reader) is _stock and "msfp_cli/" not in frames
    return f"{'bound' if is_stock and asks_too_much else outcome} {outcome} {code} {place}"


@dataclass(frozen=True)
class Answer:
    """What a process wrote, and its exit code, negative if a signal ended it."""

    words: str
    code: int


def in_child(work: Callable[[Write], object]) -> Answer:
    """Run a function in a copy of this process, with bounded memory.

    Arguments:
        work: gets a function that writes a line.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            _bound_memory()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(write, 2)  # where libraries say what they die of
            with os.fdopen(write, "w", buffering=1) as pipe:
                faulthandler.enable(pipe, all_threads=False)
                for number in (signal.SIGPROF, signal.SIGALRM):
                    signal.signal(number, signal.SIG_DFL)  # pytest may have a handler of its own
                    faulthandler.register(number, pipe, all_threads=False, chain=True)
                work(lambda line: pipe.write(_SAYS + line.replace("\n", " ") + "\n"))
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, newline="\n", errors="replace") as pipe:
        words = pipe.read()
    return Answer(words, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _bound_memory() -> None:
    size = _size()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


def _forget_earlier_trials() -> None:
    """Give back what errors of earlier trials hold in cycles, once half of the bound is taken."""
    if _size() > resource.getrlimit(resource.RLIMIT_AS)[0] - MEMORY // 2:
        gc.collect()


def _size() -> int:
    """Return how many bytes of addresses this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def bounded_time() -> Iterator[None]:
    """End this process if the block computes for too long, or waits for what never comes."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def _make(directory: Path) -> None:
    save_smallest(directory / "model")
    chain(directory / "model", directory / "run", TWO_PICTURES, CHEAP)
    export = finetune(Run(directory / "run")).export
    shutil.move(export, directory / "export")


def _canary_is_set() -> bool:
    """Ask the C library, as a pickle that calls `putenv` does not change `os.environ`."""
    import ctypes

    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return getenv(CANARY.encode()) is not None


@cache
def _code_run() -> list[str]:
    """Return a list to which everything is added from now on that runs code from a file."""
    events: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _RUNS_CODE and arguments[0] not in _HARMLESS:
            events.append(f"{event} {arguments[:2]}")

    sys.addaudithook(hook)
    return events


def outcome_of(reader: Reader, directory: Path, expected: str) -> str:
    """Read, and say in one line what came of it, the outcome first.

    Code that ran shows in `CANARY`, or in what Python tells of its own doing.
    """
    events = _code_run()
    events.clear()
    outcome = _read(reader, directory, expected)
    if events or _canary_is_set():
        os.unsetenv(CANARY)
        return f"code {events}"
    return outcome


def _read(reader: Reader, directory: Path, expected: str) -> str:
    try:
        return "equal" if reader(directory) == expected else "different"
    except BaseException as error:  # whatever it is: that is the question
        called = isinstance(error, _CallError)
        cause = error.__cause__ if called and error.__cause__ else error
        line = f"{type(cause).__name__}: {cause}".replace("\n", " ")[:200]
        if _is_explained(cause):
            return f"refused {line}"
        is_stock = (called or reader is _stock) and not _passes_through_msfp(cause)
        return f"{'stock' if is_stock else 'raw'} {line} ({_place(cause)})"


def _is_explained(error: BaseException | None) -> bool:
    """Whether it, or what caused it, is an error of msfp."""
    while error is not None and not isinstance(error, MsfpError):
        error = error.__cause__ or error.__context__
    return error is not None


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _passes_through_msfp(error: BaseException) -> bool:
    """Whether a module of msfp was at work, other than the wrapper that hands a call on."""
    names = [frame.filename for frame in _frames(error) if "msfp_cli/" in frame.filename]
    return any(not name.endswith("checkpoint/pipeline.py") for name in names)


def _place(error: BaseException) -> str:
    """Return the innermost place of msfp, or else of whoever raised it."""
    frames = _frames(error)
    own = [frame for frame in frames if "msfp_cli/" in frame.filename]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
