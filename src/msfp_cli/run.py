"""The run directory chains the commands: each finds in it what the one before has left.

A `Run` is a set of paths. What lies there is loaded by the module that also writes it, and
`status` says how far a run got. Layout::

    msfp-run/
        run.json         where the latest export is, the calibration's command and pictures
        recording/       denoiser calls to choose formats and to train on
        held-out/        denoiser calls to measure on, of different prompts and seeds
        calibration/     the chosen formats
        finetune/        LoRA hubs and router, one file per denoiser
        export/          the checkpoint (unless --out put it elsewhere)
        samples/         pictures, a directory for each `msfp sample`
        evaluation/      figures and pictures, against full precision
        report/          the page about it
"""

import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import compress
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from msfp_cli.errors import RunError
from msfp_cli.files.atomic import clean, remove_if_empty
from msfp_cli.files.documents import read_json, write_json
from msfp_cli.files.lock import beside, only_writer
from msfp_cli.files.seal import MARK
from msfp_cli.files.typed import read_value
from msfp_cli.memory import write_size

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_DIRECTORY = Path("msfp-run")
_MEMORY = "run.json"
# Where a run keeps what commands make.
_STAGES = ("recording", "held-out", "calibration", "finetune", "export", "evaluation", "report")
# A command that a line says to type, and that works in a run.
_COMMAND = re.compile(
    r"`msfp\s(calibrate|finetune|inspect|export|sample|evaluate|report|status)\b(?![^`]*--reseal)"
)


@dataclass(frozen=True)
class Run:
    """A run directory, whether it exists or not."""

    directory: Path

    def __str__(self) -> str:
        return str(self.directory)

    @property
    def option(self) -> str:
        """What names the run on a command line, a blank before it; empty for the default one."""
        if self.directory == DEFAULT_DIRECTORY:
            return ""
        return f" --run {shlex.quote(str(self.directory))}"

    def in_commands(self, line: str) -> str:
        """Name the run in the commands that a line says to type, between backticks."""
        return _COMMAND.sub(lambda found: found[0] + self.option, line)

    @property
    def is_writable(self) -> bool:
        """Whether this process may write to the run, which has to exist."""
        return os.access(self.directory, os.W_OK)

    @property
    def recording(self) -> Path:
        """The denoiser calls that calibration and fine-tuning use."""
        return self.directory / "recording"

    @property
    def held_out(self) -> Path:
        """The denoiser calls that errors are measured on."""
        return self.directory / "held-out"

    @property
    def calibration(self) -> Path:
        """The calibration's directory."""
        return self.directory / "calibration"

    @property
    def unfinished_codes(self) -> Path:
        """The directory with the weights that a calibration has rounded before it is finished."""
        return self.directory / ".unfinished-codes"

    def finetuned(self, component: str) -> Path:
        """Return the file with the fine-tuning of a denoiser."""
        return self.directory / "finetune" / f"{component}.safetensors"

    @property
    def export(self) -> Path:
        """The directory that an export goes to by default; `latest_export` says where it went."""
        return self.directory / "export"

    @property
    def samples(self) -> Path:
        """The directory with one directory of pictures for each `msfp sample`."""
        return self.directory / "samples"

    @property
    def evaluation(self) -> Path:
        """The evaluation's directory."""
        return self.directory / "evaluation"

    @property
    def report(self) -> Path:
        """The report's directory."""
        return self.directory / "report"

    def require(self) -> None:
        """Refuse a run directory that does not exist.

        Raises:
            RunError: it does not exist, or is a file or a pipeline.
        """
        if self.directory.is_file():
            raise RunError(f"{self} is a file and not a run directory; give another --run")
        if not self.directory.is_dir():
            raise RunError(
                f"no run directory {self.directory} here; `msfp calibrate` makes one, or give --run"
            )
        self.refuse_pipeline()

    def refuse_pipeline(self) -> None:
        """Refuse a directory that is a pipeline, to which no run is written.

        Raises:
            RunError: it is one.
        """
        if (self.directory / "model_index.json").exists():
            raise RunError(f"{self} is a pipeline and not a run directory; give another --run")

    def refuse_read_only(self, place: Path | None) -> None:
        """Refuse to write to a run that may only be read, before any work is done for it.

        Arguments:
            place: the directory that is written instead, as `--out` names it.

        Raises:
            RunError: there is none, and the run may not be written to.
        """
        if place is None and self.directory.is_dir() and not self.is_writable:
            raise RunError(f"{self} may only be read; give a directory of yours with --out")

    @contextmanager
    def lock(self, place: Path | None = None, *, create: bool = False) -> Iterator[None]:
        """Be the only process that writes to the run, and delete what killed ones have left.

        Arguments:
            place: a directory that is written instead; the run is only read then.
            create: make the run if there is none; if nothing comes into it, it is deleted.

        Raises:
            RunError: another process writes there, or the run does not exist.
        """
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            with only_writer(place, beside(place)):
                yield
            return
        if create:
            self.directory.mkdir(parents=True, exist_ok=True)
        self.require()
        with ExitStack() as stack:
            stack.callback(remove_if_empty, self.directory)
            lock = only_writer(self.directory, self.directory / ".msfp-lock")
            if stack.enter_context(lock):
                self._clean()
            yield

    def _clean(self) -> None:
        """Delete what killed processes have left, but nothing of `msfp sample`, which may run."""
        clean(self.directory)
        for place in (self.recording, self.held_out, self.directory / "finetune"):
            clean(place)

    def remember_export(self, export: Path) -> None:
        """Note where an export was written, so that later commands find it."""
        self._remember("export", self.name_of(export))

    def remember_calibration(
        self,
        command: Sequence[str],
        images: Path | None = None,
        device: str | None = None,
        max_memory: int | None = None,
    ) -> None:
        """Note the command of the latest calibration, finished or not, so that it can be told.

        Arguments:
            command: its words.
            images: the folder of pictures that it is given.
            device, max_memory: what it runs on, where that was said.
        """
        means = [] if device is None else ["--device", device]
        means += [] if max_memory is None else ["--max-memory", write_size(max_memory)]
        self._remember("calibrate", shlex.join([*command, *means]))
        self._remember("images", "" if images is None else self.name_of(images))

    def sampling(self) -> dict[str, Path]:
        """Return the calibration's ``images``, a default of later commands, if they still exist."""
        name = self._memory().get("images", "")
        folder = self.place_of(name)
        return {"images": folder} if name and folder.is_dir() else {}

    def say_lost_images(self) -> str:
        """Say that the calibration's ``images`` are not there any more; empty if they are."""
        name = self._memory().get("images", "")
        if not name or self.sampling():
            return ""
        return f"{self.place_of(name)}, the --images of the calibration, is not there any more"

    def calibration_command(self) -> str:
        """Return the command of the latest calibration, or one that makes the first."""
        return self._memory().get("calibrate", "msfp calibrate")

    def _remember(self, key: str, fact: str) -> None:
        memory = self._memory()
        if memory.get(key, "") != fact:
            write_json(self.directory / _MEMORY, {**memory, key: fact})

    def name_of(self, path: Path) -> str:
        """Return what the run's files call a path: relative inside the run, so that it can move."""
        place = path.resolve()
        here = self.directory.resolve()
        return str(place.relative_to(here) if place.is_relative_to(here) else place)

    def place_of(self, name: str) -> Path:
        """Undo `name_of`; earlier versions wrote paths relative to the working directory."""
        inside = self.directory / name
        return inside if inside.exists() else Path(name)

    def find_export(self) -> Path | None:
        """Return the latest export, None if there is none or if it was deleted."""
        places = [self.directory / self._memory().get("export", "export"), self.export]
        names = ("model_index.json", MARK)  # one of them may be lost, which its reader says
        is_there = [any((place / name).exists() for name in names) for place in places]
        return next(compress(places, is_there), None)

    def is_outdated(self, export: Path) -> bool:
        """Whether the run was calibrated after an export was written."""
        document = self.calibration / "calibration.json"
        return document.exists() and document.stat().st_mtime > export.stat().st_mtime

    def say_outdated(self) -> str:
        """Say that the latest export is of an earlier calibration; empty if it is not."""
        export = self.find_export()
        if export is None or not self.is_outdated(export):
            return ""
        return self.in_commands(
            f"{export} is of an earlier calibration; `msfp export --overwrite` writes it again"
        )

    def latest_export(self) -> Path:
        """Return the latest export.

        Raises:
            RunError: there is none.
        """
        self.require()
        export = self.find_export()
        if export is None:
            raise RunError(f"{self.directory} holds no export yet; run `msfp export` first")
        return export

    def _memory(self) -> dict[str, str]:
        """Return what ``run.json`` holds."""
        path = self.directory / _MEMORY
        if not path.exists():
            return {}
        redo = "delete it; `msfp export --overwrite` writes it again"
        return read_json(path, partial(read_value, dict[str, str]), redo=redo)


def locked(
    function: Callable[Concatenate[Run, P], T],
) -> Callable[Concatenate[Run, P], T]:
    """Let a function be the only writer to the run that it takes as its first argument."""

    @wraps(function)
    def wrapper(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with run.lock():
            return function(run, *args, **kwargs)

    return wrapper


def describe_sizes(directory: Path) -> str:
    """Say how many bytes the weights of each component of a pipeline take on disk."""
    sizes = dict[str, int]()
    for path in sorted(directory.glob("*/*.safetensors")):
        sizes[path.parent.name] = sizes.get(path.parent.name, 0) + path.stat().st_size
    return ", ".join(f"{name} {size / 2**20:.2f} MiB" for name, size in sizes.items())


def refuse_stage(directory: Path, own: str | None = None) -> None:
    """Refuse an output in the place where a run keeps something else.

    Arguments:
        own: the stage that is written, as its directory is called; None if it is no stage.

    Raises:
        RunError: it is such a place.
    """
    place = directory.resolve()
    if place.name in _STAGES and place.name != own and (place.parent / _MEMORY).exists():
        raise RunError(
            f"{directory} is where a run keeps its {place.name}; choose another path for --out"
        )
