"""Try the whole chain on every family of diffusers that can be built from tiny parts.

``python tests/families.py CHECKOUT`` writes docs/families.md. CHECKOUT is a checkout of diffusers
with its folder ``tests``: the tests of its pipelines say how each is built from tiny random parts
and called, so a new family costs no line here. What they take from the hub (tokenizers, a few
encoders) is replaced by `stand_ins`, so nothing is downloaded. Kolors needs the package
sentencepiece, Stable Audio torchsde, ConsisID opencv-python-headless; some tests need parameterized
or torchvision.

One module of each family comes first, then its variants, until ``--minutes`` are over.
``--only PATTERN`` tries the modules of tests whose name matches, and prints instead of writing.
"""

import argparse
import contextlib
import importlib.util
import inspect
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"

BUILD = "build"
LATE = "not begun"
STEPS = ("record, calibrate", "fine-tune", "export", "reload, sample")
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SECONDS = 150  # of the processor, for a pipeline
PATIENCE = 400  # seconds to wait for a step of one, or for what a module of tests imports
FORKING = threading.Lock()  # a process must not inherit the open end of another's pipe
LARGE = 64  # pixels; some pipelines take no smaller picture
SIZES = ("height", "width", "num_frames")
PICTURES = ("image", "control_image", "images")
REFUSED = "msfp: "  # begins the line of an error that msfp itself raised
# Why the chain cannot be tried on some pipelines, or on what some classes of tests build, where the
# error does not say it.
INVERTED = "it edits only what its method `invert` took apart before; msfp calls a pipeline once"
ROWS = "it takes rows of example pictures, and two prompts of its own kind, which msfp cannot pass"
LAST = "it needs `last_image`, for which msfp has no option"
CANNOT = {
    "LEditsPPPipelineStableDiffusion": INVERTED,
    "LEditsPPPipelineStableDiffusionXL": INVERTED,
    "WanFLFToVideoPipelineTesterConfig": LAST,
    "VisualClozePipeline": ROWS,
    "VisualClozeGenerationPipeline": ROWS,
}
ENCODER = "transformers 5 cannot load the text encoder of its test, as diffusers' tests say, too"
UNBUILT = {"PRXPipeline": ENCODER, "PRXPixelPipeline": ENCODER}
# The stand-ins' tokenizers have a token for each letter; one step alone has no order of times; and
# a test passes latents.
OTHER_INPUTS: dict[str, dict[str, Any]] = {
    "Kandinsky5I2IPipeline": {"max_sequence_length": 512},
    "SanaSprintImg2ImgPipeline": {"strength": 1.0},
    "StableDiffusionLatentUpscalePipeline": {"image": Image.new("RGB", (LARGE, LARGE))},
}
# What the chain passes to a pipeline.
PASSED = (*SIZES, "prompt", "generator", "num_inference_steps", "guidance_scale", "output_type")


@dataclass
class Outcome:
    """What came of one pipeline.

    Arguments:
        family: the folder of diffusers' tests.
        pipeline: its class.
        builder: the class of tests that builds it.
        steps: by step, ``yes`` or the last line of an error.
    """

    family: str
    pipeline: str
    builder: str
    steps: dict[str, str] = field(default_factory=dict)

    @property
    def failure(self) -> tuple[str, str] | None:
        """The step that failed, and its error; None: all passed."""
        return next(((step, line) for step, line in self.steps.items() if line != "yes"), None)


def pass_by_default(pipeline: type, inputs: Mapping[str, Any]) -> None:
    """Make the arguments that a tiny pipeline needs the defaults of its class.

    Such are the number of tokens, or the layers that a text encoder's output is taken from. What
    the chain passes itself is not among them, and neither is what no user could leave out, such as
    the frames of a video. None may choose a size out of large ones.
    """
    inputs = {"use_resolution_binning": False, **inputs}
    function = inspect.unwrap(pipeline.__call__)
    parameters = list(inspect.signature(function).parameters.values())
    names = [each.name for each in parameters if each.default is not inspect.Parameter.empty]
    defaults = dict(zip(names, function.__defaults__ or (), strict=False))
    for name in names:
        is_own = name in inputs and (name not in PASSED or inputs[name] is None)
        if is_own and is_plain(inputs[name]):
            defaults[name] = inputs[name]
    function.__defaults__ = tuple(defaults.values())


def is_plain(value: Any) -> bool:  # noqa: ANN401 (an argument of a pipeline)
    """Whether a value is made of numbers and words alone."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return isinstance(value, bool | int | float | str | type(None))


def keep_small(pipeline: type) -> None:
    """Let a pipeline that enlarges every picture to a million pixels be content with few."""
    module = sys.modules[pipeline.__module__]
    dimensions = getattr(module, "calculate_dimensions", None)
    if dimensions is not None:
        module.calculate_dimensions = lambda area, ratio: dimensions(min(area, LARGE**2), ratio)


def builders_of(module: Any) -> Iterator[type]:  # noqa: ANN401 (a module of diffusers' tests)
    """Yield the classes of a test module that build a pipeline, one for each way to build it."""
    done = set()
    for each in vars(module).values():
        own = inspect.isclass(each) and each.__module__ == module.__name__
        pipeline = getattr(each, "pipeline_class", None) if own else None
        parts = getattr(each, "get_dummy_components", None)
        is_new = (pipeline, parts) not in done
        if inspect.isclass(pipeline) and parts is not None and is_new and not _is_base(parts):
            done.add((pipeline, parts))
            yield each


def _is_base(method: Callable[..., Any]) -> bool:
    """Whether a builder's method has arguments that only the classes below it know."""
    parameters = inspect.signature(method).parameters.values()
    required = {each.name for each in parameters if each.default is inspect.Parameter.empty}
    return not required <= {"self", "device", "args", "kwargs"}


def called(method: Callable[..., Any]) -> Any:  # noqa: ANN401 (components or inputs)
    """Call a builder's method; those of older tests take a device."""
    takes_device = "device" in inspect.signature(method).parameters
    return method("cpu") if takes_device else method()


def stock_class(pipeline: type) -> type:
    """Return the class of diffusers that a class of its tests only wraps."""
    return next(cls for cls in pipeline.__mro__ if cls.__module__.startswith("diffusers."))


def publish(parts: Iterable[Any]) -> None:
    """Let diffusers find the classes of parts where it will look for them.

    It has moved some (Stable Cascade's decoder), and its tests define others. A part of these
    without a tensor has no file to be loaded from, and is made anew.
    """
    import diffusers

    for part in parts:
        cls = type(part)
        is_of_tests = cls.__module__.startswith("tests.")
        if is_of_tests and not part.state_dict():
            cls.from_pretrained = classmethod(lambda kind, *_, **__: kind())
        if is_of_tests or ".deprecated." in cls.__module__:
            folder = cls.__module__.split(".")[-2]
            setattr(getattr(diffusers.pipelines, folder, diffusers), cls.__name__, cls)


def build(builder: type) -> Mapping[str, Any]:
    """Save a tiny pipeline as ``model``, and return what its tests call it with."""
    from stand_ins import fit_to_pictures_, fit_to_tokenizers_, give_values_

    instance = builder.__new__(builder)
    with contextlib.suppress(pytest.skip.Exception):  # pipelines that diffusers has deprecated
        getattr(instance, "setUp", lambda: None)()
    components = dict(called(instance.get_dummy_components))
    fit_to_tokenizers_(components)
    fit_to_pictures_(components)
    give_values_(components)
    publish(components.values())
    pipeline = stock_class(builder.pipeline_class)
    inputs = {**called(instance.get_dummy_inputs), **OTHER_INPUTS.get(pipeline.__name__, {})}
    pass_by_default(pipeline, inputs)
    keep_small(pipeline)
    pipeline(**components).save_pretrained("model")
    return inputs


def stop(*_: object) -> None:
    """End a pipeline that takes too long."""
    raise TimeoutError(f"it took more than {SECONDS} s of the processor")


def try_family(builder: type) -> Iterator[tuple[str, str]]:
    """Yield what came of each step: ``yes``, or the last line of an error."""
    reason = UNBUILT.get(stock_class(builder.pipeline_class).__name__)
    if reason is not None:
        yield BUILD, reason
        return
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        step = BUILD
        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, SECONDS, 1)  # again, if it was caught
        try:
            for step, action in steps_of(build(builder)):
                action()
                yield step, "yes"
        except Exception as error:
            if os.environ.get("FAMILIES_TRACE"):
                traceback.print_exc()
            yield step, _line(error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _line(error: Exception) -> str:
    from msfp_cli.errors import MsfpError

    words = str(error).strip().splitlines() or [""]
    name = REFUSED if isinstance(error, MsfpError) else f"{type(error).__name__}: "
    return f"{name}{words[0][:300]}"


def steps_of(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the steps of the chain, to be taken in order."""
    from msfp_cli.calibration.calibrate import calibrate_run
    from msfp_cli.calibration.recipe import CalibrateRecipe
    from msfp_cli.checkpoint.export import export_run
    from msfp_cli.finetuning.finetune import finetune_run
    from msfp_cli.finetuning.recipe import FinetuneRecipe
    from msfp_cli.pipelines.loading import ModelSource
    from msfp_cli.pipelines.sampling import Sampling
    from msfp_cli.recording.recipe import RecordOptions
    from msfp_cli.run import Run
    from msfp_cli.sample import sample_run

    run = Run(Path("run"))
    sizes = {name: inputs[name] for name in SIZES if isinstance(inputs.get(name), int)}
    settings = {
        **sizes,
        "num_inference_steps": max(2, inputs.get("num_inference_steps") or 2),
        "batch_size": 1,
    }
    guidance = inputs.get("guidance_scale")
    if guidance is not None:
        settings["guidance_scale"] = float(guidance)
    picture = picture_of(inputs)
    if picture is not None:
        settings["images"] = write_picture(Path("pictures"), picture)
        for name, side in zip(("width", "height"), picture, strict=True):
            settings[name] = max(min(side, LARGE), sizes.get(name, 0))
    prompts = prompts_of(inputs)
    options = RecordOptions(num_images=2, prompts=prompts * 2 or None, **settings)
    recipe = CalibrateRecipe(max_samples=200, lift=0.0, rounding="nearest")
    training = FinetuneRecipe(steps=2, batch_size=1, calls_per_update=1, rank=1, hub_size=2)

    def train() -> None:
        try:
            finetune_run(run, training, device="cpu")
        except Exception as error:
            if "--loss plain" not in str(error):
                raise
            finetune_run(run, FinetuneRecipe(**{**vars(training), "loss": "plain"}), device="cpu")

    source = ModelSource(model=str(Path("model").resolve()))
    yield STEPS[0], lambda: calibrate_run(run, source, options, recipe, device="cpu")
    yield STEPS[1], train
    yield STEPS[2], lambda: export_run(run, device="cpu")
    asked = prompts or (["1"] if "class_labels" in inputs else [])
    yield STEPS[3], lambda: sample_run(run, list(asked), Sampling(**settings), device="cpu")


def picture_of(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return width and height of the picture that tests pass, if they pass one."""
    import torch

    given = next((inputs[name] for name in PICTURES if inputs.get(name) is not None), None)
    while isinstance(given, list):
        given = given[0]
    if given is None or isinstance(given, Image.Image):
        return given and given.size
    shape = given.shape[-2:] if isinstance(given, torch.Tensor) else given.shape[:2]
    return int(shape[1]), int(shape[0])


def write_picture(folder: Path, size: tuple[int, int]) -> Path:
    """Write a picture of noise, and return its folder."""
    folder.mkdir()
    Image.effect_noise(size, 64).convert("RGB").save(folder / "noise.png")
    return folder.resolve()


def prompts_of(inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the prompt that tests call a pipeline with, if it takes one."""
    prompt = inputs.get("prompt")
    first = prompt[0] if isinstance(prompt, list) else prompt
    return (first,) if isinstance(first, str) else ()


def try_module(name: str, report: Connection) -> None:
    """Report what came of each pipeline of a test module."""
    if not os.environ.get("FAMILIES_TRACE"):
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    try:
        builders = list(builders_of(importlib.import_module(name)))
    except Exception as error:
        report.send((name.rpartition(".")[2], "", BUILD, _line(error)))
        return
    for builder in builders:
        title = (stock_class(builder.pipeline_class).__name__, builder.__name__)
        report.send((*title, "", ""))  # it begins
        for step, result in try_family(builder):
            report.send((*title, step, result))


def modules_of(checkout: Path, only: str) -> list[Path]:
    """Return the modules of tests that build pipelines: first one of each family, then variants."""
    folders: dict[Path, list[Path]] = {}
    for path in sorted((checkout / "tests" / "pipelines").glob("*/test_*.py")):
        if re.search(only, str(path)) and "pipeline_class" in path.read_text():
            folders.setdefault(path.parent, []).append(path)
    ranked = [
        (rank, path)
        for paths in folders.values()
        for rank, path in enumerate(sorted(paths, key=lambda each: (len(each.name), each)))
    ]
    return [path for _, path in sorted(ranked, key=lambda each: (each[0] > 0, each[1]))]


def outcomes(checkout: Path, only: str, minutes: float, at_once: int) -> Iterator[Outcome]:
    """Yield what came of each pipeline.

    Arguments:
        minutes: after which no further module of tests is begun.
        at_once: how many modules are tried at the same time.
    """
    end = time.monotonic() + 60 * minutes

    def try_path(path: Path) -> list[Outcome]:
        if time.monotonic() > end:
            line = f"{LATE} after {minutes:g} minutes"
            return [Outcome(path.parent.name, path.stem, "", {BUILD: line})]
        return list(_tried(checkout, path))

    with ThreadPoolExecutor(at_once) as executor:
        yield from chain.from_iterable(executor.map(try_path, modules_of(checkout, only)))


def _tried(checkout: Path, path: Path) -> Iterator[Outcome]:
    """Yield what came of the pipelines of a module, in a process that is ended when it hangs."""
    context = multiprocessing.get_context("fork")  # what is imported is imported once
    name = ".".join(path.relative_to(checkout).with_suffix("").parts)
    with FORKING:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=try_module, args=(name, sender))
        process.start()
        sender.close()
    yield from _received(receiver, path.parent.name, path.stem)
    process.kill()
    process.join()


def _received(receiver: Connection, family: str, module: str) -> Iterator[Outcome]:
    """Yield what a process reports until it ends or is silent for too long."""
    outcome = Outcome(family, module, "")
    is_empty = True
    end = f"nothing came for {PATIENCE} s"
    while receiver.poll(PATIENCE):
        try:
            pipeline, builder, step, result = receiver.recv()
        except EOFError:
            if is_empty:  # nothing in the module builds a pipeline
                return
            end = "its process ended"
            break
        is_empty = False
        if builder != outcome.builder:
            if outcome.builder:
                yield outcome
            outcome = Outcome(family, pipeline, builder)
        if step:
            outcome.steps[step] = result
    missing = [step for step in STEPS if step not in outcome.steps]
    if outcome.failure is None and missing:
        outcome.steps[missing[0]] = end
    yield outcome


def page(results: list[Outcome], only: str) -> str:
    """Return the page.

    Arguments:
        only: the pattern that chose the modules of tests; empty for all.
    """
    import diffusers
    import torch
    import transformers

    versions = ", ".join(
        f"{each.__name__} {each.__version__.partition('+')[0]}"
        for each in (diffusers, transformers, torch)
    )
    option = f" --only '{only}' --write" if only else ""
    failures = [(each, *each.failure) for each in results if each.failure is not None]
    passed = [each for each in results if each.failure is None]
    failed = [(each, step, line) for each, step, line in failures if step != BUILD]
    cannot = [(each, line) for each, _, line in failed if _cannot(each, line)]
    failed = [(each, step, line) for each, step, line in failed if not _cannot(each, line)]
    unbuilt = [(each, line) for each, step, line in failures if step == BUILD and each.builder]
    others = [(each, line) for each, step, line in failures if step == BUILD and not each.builder]
    late = sorted(each.pipeline for each, line in others if line.startswith(LATE))
    unbuilt += [(each, line) for each, line in others if not line.startswith(LATE)]
    tried = [*passed, *(each for each, *_ in (*cannot, *failed))]
    lines = [
        "# Families",
        "",
        "Pipelines of diffusers that its own tests build from tiny random parts, through the whole "
        "chain: record and calibrate, fine-tune, export, reload and sample, one picture a call. "
        f"{len(passed)} of the {len(tried)} that were tried pass each step; they are of "
        f"{len(_families(passed))} of {len(_families(tried))} families. Written by "
        f"`python tests/families.py CHECKOUT{option}` with {versions}.",
        "",
        f"## Each step passes ({len(passed)})",
        "",
        *_table("family | pipelines", _family_rows(passed, results)),
        "",
        f"## Cannot be calibrated from prompts and pictures alone ({len(cannot)})",
        "",
        *_table("reason | pipelines", _reason_rows(cannot, results)),
        "",
        f"## A step does not pass ({len(failed)})",
        "",
        *_table(
            "pipeline | step | reason",
            [f"{_name(each, results)} | {step} | {_cell(line)}" for each, step, line in failed],
        ),
        "",
        f"## Not built here ({len(unbuilt)})",
        "",
        *_table(
            "pipeline | reason",
            [f"{_name(each, results)} | {_cell(line)}" for each, line in unbuilt],
        ),
    ]
    if late:
        lines += ["", f"## Not begun in the time of the run ({len(late)} modules of tests)", ""]
        lines += [
            "Variants of the families above, each a module of tests: " + ", ".join(late) + "."
        ]
    return "\n".join(lines) + "\n"


def _cannot(outcome: Outcome, line: str) -> bool:
    """Whether msfp refuses a pipeline in one line, or it is known why it cannot be tried."""
    return line.startswith(REFUSED) or _known_reason(outcome) is not None


def _reason(outcome: Outcome, line: str) -> str:
    """Return why a pipeline cannot be tried, as a cell."""
    known = _known_reason(outcome)
    missing = re.search(r"(?:needs|failed without) '(\w+)'", line)
    if known is None and missing is not None:
        return f"it needs `{missing[1]}`, for which msfp has no option"
    return _cell(known or line.removeprefix(REFUSED))


def _known_reason(outcome: Outcome) -> str | None:
    return CANNOT.get(outcome.pipeline, CANNOT.get(outcome.builder))


def _families(results: Iterable[Outcome]) -> set[str]:
    return {each.family for each in results}


def _table(titles: str, rows: Iterable[str]) -> list[str]:
    """Return the lines of a table, or a word where it has no rows."""
    lines = [f"| {row} |" for row in rows]
    rule = "|".join("---" for _ in titles.split("|"))
    return [f"| {titles} |", f"|{rule}|", *lines] if lines else ["None."]


def _family_rows(passed: list[Outcome], results: list[Outcome]) -> Iterator[str]:
    """Yield a row for each family, its pipelines in a cell."""
    pairs = [(each.family, _name(each, results)) for each in passed]
    for family, pipelines in sorted(_grouped(pairs).items()):
        yield f"{family} | {', '.join(sorted(pipelines))}"


def _reason_rows(cannot: list[tuple[Outcome, str]], results: list[Outcome]) -> Iterator[str]:
    """Yield a row for each reason, the pipelines in a cell."""
    pairs = [(_reason(each, line), _name(each, results)) for each, line in cannot]
    for reason, pipelines in _grouped(pairs).items():
        yield f"{reason} | {', '.join(sorted(pipelines))}"


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the second items of pairs by the first."""
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _name(outcome: Outcome, results: list[Outcome]) -> str:
    """Return the name of a pipeline, with the class of tests where several build it."""
    same = [each for each in results if each.pipeline == outcome.pipeline]
    builder = re.sub(r"^Test|(Pipeline)?(Fast)?(Tests?|TesterConfig)$", "", outcome.builder)
    return outcome.pipeline if len(same) == 1 else f"{outcome.pipeline} ({builder})"


def _cell(text: str) -> str:
    """Return a text as a cell of a table."""
    place = re.sub(r"/tmp/tmp\w+/", "", text)
    return place.replace("|", "/").replace("<", "&lt;")


def main() -> None:
    """Try the families, and write or print the table."""
    from stand_ins import patch_hub

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=120, help="bound on the whole run")
    parser.add_argument("--at-once", type=int, default=1, help="modules of tests at the same time")
    parser.add_argument("--write", action="store_true", help="write the page with --only, too")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout))
    for missing in ("requests_mock", "parameterized"):  # which only tests call
        if importlib.util.find_spec(missing) is None:
            sys.modules[missing] = MagicMock()
    patch_hub()
    for each in ("tests.pipelines.test_pipelines_common", "msfp_cli.commands.app"):
        importlib.import_module(each)
    results: list[Outcome] = []
    settings = (arguments.only, arguments.minutes, arguments.at_once)
    for outcome in outcomes(arguments.checkout, *settings):
        results.append(outcome)
        print(
            outcome.family,
            outcome.pipeline,
            outcome.builder,
            outcome.failure or "passes",
            flush=True,
        )
        if arguments.write or not arguments.only:  # a run that is stopped leaves what it has
            PAGE.write_text(page(results, arguments.only), "utf-8")


if __name__ == "__main__":
    main()
