"""Models, runs and recordings that several test modules share, each made once."""

import os

# No test but those of the loopback hub may look for a network; it is read when the hub's client is
# imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models gain nothing from threads, which would wait for each other in busy loops beside
# another busy process; and one thread sums in one order, so that two processes can be compared with
# one. Read by torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As the command line does, for processes that lose each other.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import dataclasses
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from typer.testing import CliRunner, Result

import msfp_cli.calibration.calibrate
import msfp_cli.demo
from msfp_cli.calibration.calibrate import calibrate_run
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import ExportReport, export_run
from msfp_cli.commands.app import app
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.evaluation.evaluate import evaluate_run
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.finetuning.finetune import finetune_run
from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.finetuning.result import FinetuneReport, FinetuneState
from msfp_cli.pipelines.denoiser import DenoiserCall, find_denoisers
from msfp_cli.pipelines.loading import BUILT_IN, ModelSource, load_pipeline
from msfp_cli.progress import NoProgress
from msfp_cli.recording.recipe import RecordOptions
from msfp_cli.recording.record import record_both
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run
from tiny_pipelines import save_tiny

# Whoever runs the tests in the background of a script, or under `nohup`, ignores these, and so do
# the processes that tests start.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Warnings are errors; torch would give some of its own only once, to whichever test comes first.
torch.set_warn_always(True)
quiet_libraries()

EVERY_LAYER = tuple(
    f"{name}:8" for name in ("conv_in", "conv_out", "x_embedder", "pos_embed.*", "proj_out*")
)
QUICK = CalibrateRecipe(max_samples=1000, sensitivity_calls=1, keep=EVERY_LAYER)
TWO_PICTURES = RecordOptions(num_images=2, num_inference_steps=2, batch_size=2)
# Three shards of three timesteps, one of them held out.
SIX_PICTURES = RecordOptions(num_images=6, num_inference_steps=3, batch_size=2)
# To the nearest, where a few updates of training gain enough to be told from noise.
CHEAP = CalibrateRecipe(
    max_samples=200,
    sensitivity_calls=1,
    lift=0.0,
    formats="e2m1,ue2m2",
    keep=EVERY_LAYER,
    rounding="nearest",
)
FEW_UPDATES = FinetuneRecipe(
    steps=6,
    batch_size=2,
    calls_per_update=1,
    rank=2,
    hub_size=3,
    learning_rate=0.1,
    router_learning_rate=0.01,
    loss_power=1.0,
    evaluate_every=3,
)
# Enough rows that the held-out error falls by a tenth with any seed, on any processor.
CLEAR_GAIN = dataclasses.replace(FEW_UPDATES, batch_size=12, rank=8)
CONDITIONS: dict[str, tuple[str | None, ...]] = {
    "prompt": ("a cat",),
    "class_labels": ("1",),
    "none": (None,),
}

Invoke = Callable[..., Result]


class Lines(NoProgress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, line: str) -> None:
        self.lines.append(line)


@dataclass(frozen=True)
class Chained:
    """A run that was calibrated and exported, with what the two steps returned."""

    run: Run
    calibration: Calibration
    report: ExportReport

    @property
    def export(self) -> Path:
        """Where the export is."""
        return Path(self.report.directory)


def chain(
    model: str | Path,
    directory: Path,
    options: RecordOptions = TWO_PICTURES,
    recipe: CalibrateRecipe = QUICK,
) -> Chained:
    """Calibrate and export a model into a run directory."""
    run = Run(directory)
    calibration = calibrate_run(run, ModelSource(model=str(model)), options, recipe)
    return Chained(run, calibration, export_run(run))


@dataclass(frozen=True)
class Finetuned:
    """A run that was calibrated, fine-tuned and exported, with what the steps returned."""

    run: Run
    calibration: Calibration
    tuned: FinetuneState
    report: ExportReport

    @property
    def export(self) -> Path:
        """Where the export is."""
        return Path(self.report.directory)


def train(run: Run, recipe: FinetuneRecipe = FEW_UPDATES, **options: object) -> FinetuneState:
    """Fine-tune a run that has one denoiser, and return its saved state."""
    (report,) = finetune_run(run, recipe, device="cpu", **options)
    return FinetuneState.load(Path(report.file))


def record_few(
    model: Path, directory: Path, **options: int
) -> tuple[DiffusionPipeline, nn.Module, list[DenoiserCall]]:
    """Record two steps of a pipeline; return it, its one denoiser and the calls."""
    source = ModelSource(model=str(model))
    pipe = load_pipeline(source, "cpu")
    recording, _ = record_both(
        pipe, Run(directory), source, RecordOptions(num_inference_steps=2, **options)
    )
    ((component, denoiser),) = find_denoisers(pipe).items()
    return pipe, denoiser, list(recording.calls(component))


def settle(tuned: FinetuneState, kind: str = "best", num_layers: int = 5) -> FinetuneState:
    """Return a state whose router takes one member, not the same, for each of the first layers.

    Arguments:
        kind: "best", or "now" for the last update, whether or not the held-out error fell.
    """
    tensors = tuned.tensors_of(kind)
    bias = tensors["router.logits.bias"].clone().view(-1, tuned.recipe.hub_size)
    for layer in range(num_layers):
        bias[layer, layer % tuned.recipe.hub_size] += 1000
    best = {f"best/{name}": tensor.clone() for name, tensor in tensors.items()}
    return dataclasses.replace(
        tuned, tensors=tuned.tensors | best | {"best/router.logits.bias": bias.view(-1)}
    )


def finetune(run: Run, recipe: FinetuneRecipe = FEW_UPDATES, *, kind: str = "best") -> Finetuned:
    """Fine-tune and export a calibrated run that has one denoiser, most of whose layers switch."""
    tuned = settle(train(run, recipe, restart=True), kind)
    calibration = Calibration.load(run.calibration)
    tuned.save(run.finetuned(*calibration.layers))
    return Finetuned(run, calibration, tuned, export_run(run, overwrite=True))


def files_of(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory, hidden ones too."""
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
    }


def only_error(result: Result, exit_code: int) -> str:
    """Return the one error on stderr of a command that failed as it should, its last line."""
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.stderr
    *before, last = result.stderr.splitlines()
    assert last.startswith("error: "), result.stderr
    assert not any("error: " in line for line in before), result.stderr
    return last.removeprefix("error: ").strip()


def only_line(result: Result, exit_code: int) -> str:
    """Return the one line on stderr of a command that failed as it should."""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return only_error(result, exit_code)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the scripts: they take longest, and those of a file run in one process."""
    items.sort(key=lambda item: "scripts" not in item.path.parts)


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """Fail the test that leaves a function of torch.nn replaced, not the tests that come later."""
    register = nn.Module.register_parameter
    yield
    assert nn.Module.register_parameter is register, "a model was left half loaded"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the directory of a tiny pipeline by the name of its class."""
    root = tmp_path_factory.mktemp("tiny")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            save_tiny(name, root / name)
        return root / name

    return directory


@pytest.fixture(scope="session")
def tiny_source(tiny: Callable[[str], Path]) -> ModelSource:
    """Return the smallest model: unconditional, in pixel space."""
    return ModelSource(model=str(tiny("DDIMPipeline")))


@pytest.fixture
def tiny_pipe(tiny_source: ModelSource) -> DiffusionPipeline:
    """Load the smallest model, to be changed at will."""
    return load_pipeline(tiny_source, "cpu")


@pytest.fixture(scope="session")
def tiny_recordings(
    tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recording, Recording]:
    """Record the smallest model: calls to choose on, and held-out ones."""
    run = Run(tmp_path_factory.mktemp("tiny-recordings"))
    return record_both(load_pipeline(tiny_source, "cpu"), run, tiny_source, TWO_PICTURES)


@pytest.fixture(scope="session")
def tiny_chained(tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Chained:
    """Calibrate and export the smallest model. Not to be changed: see `copied`."""
    return chain(tiny_source.model, tmp_path_factory.mktemp("tiny-chained") / "run")


@pytest.fixture(scope="session")
def prompted_chained(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Chained:
    """Calibrate and export a tiny text-to-image model. Not to be changed: see `copied`."""
    return chain(
        tiny("StableDiffusionPipeline"), tmp_path_factory.mktemp("prompted-chained") / "run"
    )


@pytest.fixture(scope="session")
def calibrated(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """Return a function that gives a calibrated run of a tiny pipeline. Not to be changed."""
    root = tmp_path_factory.mktemp("calibrated")

    def run_of(name: str) -> Run:
        run, source = Run(root / name), ModelSource(model=str(tiny(name)))
        if not run.directory.exists():
            options = SIX_PICTURES if name in ("DDIMPipeline", "DiTPipeline") else TWO_PICTURES
            calibrate_run(run, source, options, CHEAP, device="cpu")
        return run

    return run_of


@pytest.fixture
def fresh_run(calibrated: Callable[[str], Run], copied: Callable[..., Path]) -> Callable[..., Run]:
    """Return a function that copies a calibrated run of a tiny pipeline (to a name of its own)."""
    return lambda model="DiTPipeline", name="msfp-run": Run(
        copied(calibrated(model).directory, name)
    )


@pytest.fixture(scope="session")
def tiny_tuned(
    calibrated: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory
) -> Finetuned:
    """Fine-tune and export the smallest model. Not to be changed: see `copied`."""
    directory = tmp_path_factory.mktemp("tiny-tuned") / "run"
    run = Run(shutil.copytree(calibrated("DDIMPipeline").directory, directory))
    return finetune(run, CLEAR_GAIN)


@pytest.fixture(scope="session")
def prompted_tuned(
    prompted_chained: Chained, tmp_path_factory: pytest.TempPathFactory
) -> Finetuned:
    """Fine-tune and export a tiny text-to-image model. Not to be changed: see `copied`."""
    directory = tmp_path_factory.mktemp("prompted-tuned") / "run"
    run = Run(shutil.copytree(prompted_chained.run.directory, directory))
    recipe = dataclasses.replace(FEW_UPDATES, steps=2, evaluate_every=2)
    # Two updates of random weights lower the held-out error on some processors only.
    return finetune(run, recipe, kind="now")


@pytest.fixture(scope="session")
def tiny_grouped(tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Chained:
    """Calibrate the smallest model with 8-bit inputs and weights in groups; see `tiny_chained`."""
    recipe = dataclasses.replace(
        QUICK, activations=8, weight_groups=16, lift=0.2, formats="e2m1,e1m6,ue1m7"
    )
    run = tmp_path_factory.mktemp("tiny-grouped") / "run"
    return chain(tiny_source.model, run, SIX_PICTURES, recipe)


@pytest.fixture(scope="session")
def tiny_lifting(tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Chained:
    """Calibrate the smallest model with inputs lifted at one of three timesteps."""
    recipe = dataclasses.replace(QUICK, input_lift=0.4, lift=0.2, formats="e2m1,ue2m2")
    run = tmp_path_factory.mktemp("tiny-lifting") / "run"
    return chain(tiny_source.model, run, SIX_PICTURES, recipe)


@pytest.fixture(scope="session")
def prompted_transformed(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Chained:
    """Calibrate a tiny text-to-image model with rotated inputs and token scales wherever it can."""
    recipe = dataclasses.replace(CHEAP, rotate="hadamard", input_scales="token")
    recipe = dataclasses.replace(recipe, rounding="compensated")
    run = tmp_path_factory.mktemp("prompted-transformed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msfp_cli.calibration.layer_search._GAIN", -0.5)
        return chain(tiny("StableDiffusionPipeline"), run, SIX_PICTURES, recipe)


@pytest.fixture(scope="session")
def fashion_recordings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, Recording]:
    """Record the built-in model, which is trained and therefore has real activations."""
    source, run = ModelSource(model=BUILT_IN), Run(tmp_path_factory.mktemp("fashion"))
    options = RecordOptions(num_images=5, num_inference_steps=4, batch_size=2)
    return record_both(load_pipeline(source, "cpu"), run, source, options)


@pytest.fixture(scope="session")
def fashion_chained(
    fashion_recordings: tuple[Recording, Recording], tmp_path_factory: pytest.TempPathFactory
) -> Chained:
    """Calibrate and export the built-in model, lifting its worst layers. Not to be changed."""
    directory = tmp_path_factory.mktemp("fashion-chained") / "run"
    for recording, name in zip(fashion_recordings, ("recording", "held-out"), strict=True):
        shutil.copytree(recording.directory, directory / name)
    options = RecordOptions(num_images=5, num_inference_steps=4, batch_size=2)
    return chain(
        BUILT_IN, directory, options, CalibrateRecipe(max_samples=4000, sensitivity_calls=1)
    )


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a directory where a test may change it."""

    def copy(directory: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(directory, tmp_path / name))

    return copy


@pytest.fixture
def msfp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    """Return a function that runs the command line in an otherwise empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSFP_DEBUG", "")
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="msfp")

    return invoke


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], Path]) -> Iterator[None]:
    """Make the built-in model, and any hub model, a tiny one, and calibrate on a few calls only."""

    def calibrate_quickly(
        run: Run,
        source: ModelSource,
        options: RecordOptions,
        recipe: CalibrateRecipe,
        **rest: object,
    ) -> Calibration:
        fewer = dataclasses.replace(
            options,
            num_images=2 if options.num_images is None else min(options.num_images, 2),
            num_inference_steps=2,
        )
        smaller = dataclasses.replace(recipe, max_samples=1000, sensitivity_calls=1)
        return calibrate_run(run, source, fewer, smaller, **rest)

    def finetune_quickly(run: Run, recipe: FinetuneRecipe, **rest: object) -> list[FinetuneReport]:
        smaller = dataclasses.replace(recipe, steps=2, evaluate_every=2, batch_size=2, rank=2)
        return finetune_run(run, smaller, **rest)

    def evaluate_quickly(
        run: Run, export: Path, options: EvaluateRecipe, **rest: object
    ) -> Evaluation:
        fewer = dataclasses.replace(options, num_images=4, extractor="squeezenet", cost=False)
        return evaluate_run(run, export, fewer, **rest)

    def launch_none(num_processes: int) -> int:
        print(f"would launch {num_processes} processes")
        return 0

    def load_locally(
        source: ModelSource, device: str | None = None, *, streamed: bool = False
    ) -> DiffusionPipeline:
        if source.model.count("/") == 1:
            source = dataclasses.replace(source, model=str(tiny("StableDiffusionPipeline")))
        return load_pipeline(source, device, streamed=streamed)

    monkeypatch.setattr(
        "msfp_cli.pipelines.loading.built_in_directory", lambda: tiny("StableDiffusionPipeline")
    )
    monkeypatch.setattr(msfp_cli.calibration.calibrate, "calibrate_run", calibrate_quickly)
    monkeypatch.setattr(msfp_cli.calibration.calibrate, "load_pipeline", load_locally)
    monkeypatch.setattr(
        "msfp_cli.streaming.quantize.fetch_pipeline", lambda source: tiny("FluxPipeline")
    )
    monkeypatch.setattr(msfp_cli.demo, "calibrate_run", calibrate_quickly)
    monkeypatch.setattr(msfp_cli.demo, "finetune_run", finetune_quickly)
    monkeypatch.setattr(msfp_cli.demo, "evaluate_run", evaluate_quickly)
    monkeypatch.setattr("msfp_cli.evaluation.evaluate.evaluate_run", evaluate_quickly)
    monkeypatch.setattr("msfp_cli.finetuning.finetune.finetune_run", finetune_quickly)
    monkeypatch.setattr("msfp_cli.commands.launch._launch", launch_none)
    monkeypatch.setattr(msfp_cli.demo, "_PROMPTS", msfp_cli.demo._PROMPTS[:2])
    yield
