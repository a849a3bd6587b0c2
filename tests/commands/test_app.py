"""The command line: its help, its examples, its two streams, its exit codes and its errors."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
from diffusers import ControlNetModel, DDIMPipeline, DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from typer.testing import CliRunner

import tiny_pipelines
from conftest import Chained, Finetuned, Invoke, only_line
from msfp_cli import __version__
from msfp_cli.commands.app import app
from msfp_cli.errors import RunError
from msfp_cli.evaluation.evaluate import evaluate_run
from msfp_cli.evaluation.recipe import EvaluateRecipe
from msfp_cli.evaluation.result import Evaluation
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.run import Run

COMMANDS = [command.name for command in app.registered_commands]
QUICKLY = ("--num-images", 2, "--steps", 2)


def help_of(command: str) -> str:
    """Return a command's help, wide enough for no line to be broken."""
    return CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).stdout


def examples_in(text: str) -> list[str]:
    """Return the command lines in a help text."""
    return [line.strip() for line in text.splitlines() if re.match(r"\s*msfp \w", line)]


EXAMPLES = [example for command in COMMANDS for example in examples_in(help_of(command))]


def save_photos(evaluation: Evaluation, directory: Path) -> None:
    """Write full precision's pictures as files: a reference of the right size."""
    directory.mkdir()
    for i, picture in enumerate(evaluation.gallery("full").pictures()):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(directory / f"{i}.png")


@pytest.fixture
def stage(
    prompted_chained: Chained, prompted_tuned: Finetuned, copied: Callable[..., Path]
) -> Callable[..., Path]:
    """Return a function that puts a run in the working directory as it is before a command."""

    def prepare(command: str, run: str = "msfp-run", chained: Chained = prompted_chained) -> Path:
        Path("prompts.txt").write_text("a red dress\na blue bag\n")
        Path("labels.txt").write_text("1\n5000\n")
        if command in ("quantize", "calibrate", "demo"):
            return Path(run)
        if command == "inspect":
            return copied(prompted_tuned.run.directory, run)
        directory = copied(chained.run.directory, run)
        if command == "export":
            shutil.copytree(directory / "export", "dresses-fp4")  # to seal again, or overwrite
            shutil.rmtree(directory / "export")
            (directory / "run.json").unlink()
        if command == "evaluate":
            shutil.copytree(directory / "export", "my-model-fp4")
        if command in ("evaluate", "report"):
            options = EvaluateRecipe(
                num_images=4, compare=(), layers=command == "report", cost=False
            )
            evaluation = evaluate_run(
                Run(directory), directory / "export", options, directory=Path("my-evaluation")
            )
            save_photos(evaluation, Path("photos"))
        if command == "report":
            shutil.copytree("my-evaluation", directory / "evaluation")
        return directory

    return prepare


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    assert (
        help_of(command) == CliRunner().invoke(app, [command, "-h"], env={"COLUMNS": "300"}).stdout
    )
    assert (
        len([example for example in examples_in(help_of(command)) if example.split()[1] == command])
        >= 2
    )


def test_help_lists_every_command_and_says_how_to_begin() -> None:
    text = CliRunner().invoke(app, ["-h"]).stdout
    assert CliRunner().invoke(app, ["--help"]).stdout == text
    assert [
        command for command in COMMANDS if not re.search(rf"^\W*{command} ", text, re.MULTILINE)
    ] == []
    assert "msfp calibrate MODEL" in text


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_example_of_the_help_works(
    example: str, msfp: Invoke, stage: Callable[..., Path], quick: None
) -> None:
    _, command, *rest = shlex.split(example)
    stage(command)
    result = msfp(command, *rest)
    assert result.exit_code == 0, result.stderr
    assert result.stdout


def test_demo_ends_with_a_report_and_a_picture_of_four_models(msfp: Invoke, quick: None) -> None:
    result = msfp("demo", "--json")
    report = json.loads(result.stdout)
    assert (report["picture"], report["page"]) == (
        "msfp-demo/demo.png",
        "msfp-demo/report/report.html",
    )
    page = Path(report["page"]).read_text("utf-8")
    titles = ("full precision", *report["errors"])
    assert titles[1:3] == ("signed FP4", "MSFP")  # two updates may or may not be better than none
    assert all(json.dumps(title) in page for title in titles)
    with Image.open(report["picture"]) as sheet:
        assert sheet.height > len(titles) * 128  # small pictures are enlarged to at least 128
    assert 0 < report["errors"]["MSFP"] < report["errors"]["signed FP4"]
    assert f"MSFP {report['errors']['MSFP']:.4f}" in result.stderr
    assert Path(report["export"]["directory"], "model_index.json").exists()


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (("calibrate", "MODEL", *QUICKLY), "msfp-run/calibration"),
        (("finetune", "--steps", 1, "--rank", 1), "msfp-run/finetune"),
        (("inspect",), "msfp-run/finetune"),
        (("export",), "msfp-run/export"),
        (("export", "--out", "dresses"), "dresses"),
        (("sample", "--prompt", "a cat"), "msfp-run/samples/001/sheet.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stdout_holds_only_the_path_of_the_result(
    command: tuple[object, ...],
    path: str,
    msfp: Invoke,
    stage: Callable[..., Path],
    tiny_source: ModelSource,
) -> None:
    stage(command[0])
    result = msfp(*(tiny_source.model if argument == "MODEL" else argument for argument in command))
    assert (result.exit_code, result.stdout) == (0, f"{path}\n"), result.stderr
    assert Path(path).exists()


def test_calibration_reports_formats_layers_size_and_error_on_stderr(
    msfp: Invoke, tiny_chained: Chained, tiny_source: ModelSource
) -> None:
    result = msfp("calibrate", tiny_source.model, *QUICKLY)
    layers = tiny_chained.calibration.layers["unet"]
    assert f"unet: formats of {len(layers)} layers" in result.stderr
    assert "unet: most sensitive layers" in result.stderr
    rows = [line for line in result.stderr.splitlines() if line.startswith("│")]
    assert len([name for name in layers if any(f" {name} " in row for row in rows)]) == 10
    for pattern in (r"held-out calls 0\.\d{4} ", r"weights \d\.\d MiB, 0\.\d{3} of half precision"):
        assert re.search(pattern, result.stderr), pattern


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (("calibrate", "MODEL", *QUICKLY), {"source", "recipe", "held_out_error", "components"}),
        (("finetune", "--steps", 1, "--rank", 1), {"unet"}),
        (("inspect",), {"unet"}),
        (
            ("export",),
            {"directory", "denoiser_bytes", "half_precision_bytes", "ratio", "hub_bytes"},
        ),
        (("sample", "--prompt", "a cat"), {"sheet", "pictures"}),
        (
            ("status",),
            {
                "recording",
                "held-out",
                "calibration",
                "finetune",
                "export",
                "components",
                "evaluation",
                "report",
                "next",
            },
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_json_is_all_that_is_on_stdout(
    command: tuple[object, ...],
    keys: set[str],
    msfp: Invoke,
    stage: Callable[..., Path],
    tiny_source: ModelSource,
) -> None:
    stage(command[0])
    result = msfp(
        *(tiny_source.model if argument == "MODEL" else argument for argument in command), "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert keys <= json.loads(result.stdout).keys()


def test_json_of_a_calibration_tells_what_was_asked_for_and_chosen(
    msfp: Invoke, tiny_source: ModelSource
) -> None:
    options = (
        "--weights",
        6,
        "--activations",
        "none",
        "--formats",
        "signed",
        "--keep",
        "conv_out:8",
        "--lift",
        0,
    )
    data = json.loads(
        msfp("calibrate", tiny_source.model, *QUICKLY, *options, "--seed", 4, "--json").stdout
    )
    recipe, unet = data["recipe"], data["components"]["unet"]
    assert (recipe["weights"], recipe["activations"], recipe["formats"]) == (6, None, "signed")
    assert (recipe["keep"], recipe["lift"], recipe["seed"]) == (["conv_out:8"], 0, 4)
    assert unet["lifted"] == []
    assert unet["roles"] == {
        "first": ["conv_in"],
        "last": ["conv_out"],
        "conditions": ["time_embedding.linear_1", "time_embedding.linear_2"],
    }
    assert data["floating_point"]["unet"]["conv_in"] > 0
    assert unet["input_formats"] == {"float": unet["layers"]}
    assert sum(unet["weight_formats"].values()) == unet["layers"]
    assert unet["weight_formats"]["float"] == 1
    assert data["source"]["model"] == tiny_source.model


def test_calibrate_says_where_wider_inputs_are_free(
    msfp: Invoke, tiny_source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = "`msfp calibrate` with --activations 8 --overwrite"
    for runs_here in (False, True):
        monkeypatch.setattr("msfp_cli.layers.kernels.cpu.runs_on_this_cpu", lambda r=runs_here: r)
        result = msfp("calibrate", tiny_source.model, *QUICKLY, "--device", "cpu", "--overwrite")
        assert (advice in " ".join(result.stderr.split())) == runs_here
    lifting = ("--device", "cpu", "--input-lift", 0.5, "--overwrite")
    result = msfp("calibrate", tiny_source.model, *QUICKLY, *lifting)
    assert f"{advice}, and without --input-lift, has" in " ".join(result.stderr.split())
    result = msfp("calibrate", tiny_source.model, *QUICKLY, "--activations", 8, "--overwrite")
    assert result.exit_code == 0
    assert "--activations" not in result.stderr


def test_status_follows_the_chain(
    msfp: Invoke, stage: Callable[..., Path], tiny_source: ModelSource
) -> None:
    assert "`msfp calibrate` makes one" in only_line(msfp("status"), 1)
    Path("msfp-run").mkdir()
    assert "next: msfp calibrate" in msfp("status").stderr
    assert msfp("calibrate", tiny_source.model, *QUICKLY).exit_code == 0
    assert "next: msfp finetune" in msfp("status").stderr
    assert msfp("finetune", "--steps", 1, "--rank", 1).exit_code == 0
    assert "next: msfp export" in msfp("status").stderr
    assert msfp("export").exit_code == 0
    result = msfp("status")
    assert "next: msfp sample" in result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "recording",
        "held-out",
        "calibration",
        "floats",
        "finetune",
        "export",
        "components",
        "evaluation",
        "report",
    ]


def model_of(kind: str, pipe: DiffusionPipeline) -> list[str]:
    """Return the words that name a model whose pipeline takes pictures, made of another's parts."""
    name = f"StableDiffusion{kind}Pipeline"
    parts = pipe.components
    if kind == "InstructPix2Pix":  # the picture's latents are put beside the sample
        parts["unet"] = tiny_pipelines._conditional_unet(in_channels=8)
    elif kind == "ControlNet":  # it halves the picture, as this autoencoder does
        net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=[8, 8])
        tiny_pipelines._replace_zero_weights(net)
        parts["controlnet"] = net
    else:
        return ["--pipeline", name]
    getattr(diffusers, name)(**parts, requires_safety_checker=False).save_pretrained("model")
    return ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint", "InstructPix2Pix", "ControlNet"])
def test_pictures_go_through_the_whole_chain(
    kind: str, msfp: Invoke, quick: None, tiny: Callable[[str], Path]
) -> None:
    model = model_of(kind, DiffusionPipeline.from_pretrained(tiny("StableDiffusionPipeline")))
    for folder, color in (("photos", "red"), ("others", "green")):
        Path(folder).mkdir()
        Image.new("RGB", (32, 32), color).save(Path(folder) / "a.png")
    given = ("--images", "photos")
    result = msfp("calibrate", *model, *given)
    assert result.exit_code == 0, result.stderr
    assert "stand in" not in result.stderr
    assert msfp("export").exit_code == 0
    for folder in ("photos", "others"):
        options = ("--prompt", "a cat", "--images", folder, "--out", f"of-{folder}")
        result = msfp("sample", *options)
        assert result.exit_code == 0, result.stderr
    assert msfp("sample", "--prompt", "a cat", "--out", "again").exit_code == 0
    places = ("of-photos", "of-others", "again")
    made = [Image.open(f"{place}/000-a-cat-seed0.png") for place in places]
    assert made[0].size == made[1].size and made[0].tobytes() != made[1].tobytes()
    assert made[2].tobytes() == made[0].tobytes()  # with the pictures of the calibration
    result = msfp("evaluate", "--num-trajectories", 1)
    assert result.exit_code == 0, result.stderr
    assert "stand in" not in result.stderr
    measured = Evaluation.load(Path("msfp-run/evaluation")).models[-1]
    assert all(0 < psnr < 100 for psnr in measured.per_picture["psnr"])


@pytest.mark.parametrize("run", ["msfp-run", "my runs"])
@pytest.mark.parametrize("kind", ["prompted", "unconditional"])
def test_next_command_works_as_it_is_written(
    run: str,
    kind: str,
    msfp: Invoke,
    stage: Callable[..., Path],
    prompted_chained: Chained,
    tiny_chained: Chained,
    quick: None,
) -> None:
    stage("export", run, prompted_chained if kind == "prompted" else tiny_chained)
    result = msfp("status", "--run", run)
    for command in ("finetune", "export", "sample"):
        (following,) = re.findall(r"^next: (.+)$", result.stderr, re.MULTILINE)
        assert shlex.split(following)[:2] == ["msfp", command]
        result = msfp(*shlex.split(following)[1:])
        assert result.exit_code == 0, f"{following}\n{result.stderr}"


_EXPORTED, _CALIBRATED = "sample", "export"


@pytest.mark.parametrize(
    ("stage_of", "command", "message", "exit_code"),
    [
        (
            None,
            "calibrate --prompts missing.txt",
            "cannot read prompts from missing.txt: No such file",
            2,
        ),
        (None, "calibrate --prompts empty.txt", "empty.txt holds no prompts; write one a line", 2),
        (
            None,
            "calibrate --weights 9",
            "--weights '9' is out of range; choose 2 to 8 bits, or none",
            2,
        ),
        (
            None,
            "calibrate --activations 1",
            "--activations '1' is out of range; choose 2 to 8 bits, or none",
            2,
        ),
        (None, "calibrate --weights four", "--weights 'four'", 2),
        (
            None,
            "calibrate --weights none --activations none",
            "neither weights nor activations are quantized",
            2,
        ),
        (None, "calibrate --formats e9m9", "e9m9", 2),
        (
            None,
            "calibrate --formats fp4",
            "unknown format 'fp4'; write it like e2m1 (signed) or ue2m2",
            2,
        ),
        (None, "calibrate --formats e4m3", "e4m3", 2),
        (None, "calibrate --keep conv_in", "cannot read --keep 'conv_in'; write PATTERN:BITS", 2),
        (None, "calibrate --keep conv_in:1", "--keep '1' is out of range", 2),
        (
            None,
            "calibrate --lift 1.5",
            "--lift must be at most 1, got 1.5",
            2,
        ),
        (None, "calibrate --lift nan", "--lift must be at least 0, got nan", 2),
        (
            None,
            "calibrate --dtype float8",
            "unknown --dtype 'float8'; choose one of float32, float16, bfloat16",
            2,
        ),
        (None, "calibrate --num-images 0", "--num-images must be at least 1, got 0", 2),
        (
            None,
            "calibrate {unconditional} --prompts prompts.txt",
            "DDIMPipeline takes no prompts; leave --prompts",
            2,
        ),
        (
            None,
            "calibrate {classes} --prompts prompts.txt",
            "'a red dress' is not a class label of this pipeline",
            2,
        ),
        (
            None,
            "calibrate {classes} --prompts labels.txt",
            "class label 5000 is too large: this pipeline has ",
            2,
        ),
        (None, "export", "no run directory msfp-run here; `msfp calibrate` makes one", 1),
        (
            None,
            "sample --prompt cat",
            "no run directory msfp-run here; `msfp calibrate` makes one",
            1,
        ),
        (None, "status --run nowhere", "no run directory nowhere here", 1),
        (
            None,
            "sample nowhere --prompt cat",
            "nowhere is not an exported pipeline: it has no model_index.json",
            1,
        ),
        (
            None,
            "sample {unconditional}",
            "but msfp did not export it; run `msfp calibrate {unconditional}` and `msfp export`",
            1,
        ),
        (
            "uncalibrated",
            "export",
            "no calibration in msfp-run/calibration; run `msfp calibrate` first",
            1,
        ),
        (_CALIBRATED, "calibrate", "msfp-run/calibration exists already; use --overwrite", 1),
        (
            _CALIBRATED,
            "sample --prompt cat",
            "msfp-run holds no export yet; run `msfp export` first",
            1,
        ),
        (_EXPORTED, "export", "msfp-run/export exists already; use --overwrite", 1),
        (_EXPORTED, "export --out prompts.txt", "prompts.txt exists already; use --overwrite", 1),
        (
            _EXPORTED,
            "sample",
            'no prompt; give at least one, for instance --prompt "a red dress"',
            2,
        ),
        (_EXPORTED, "sample --prompts empty.txt", "empty.txt holds no prompts", 2),
        (
            _EXPORTED,
            "sample --prompt cat --num-images 0",
            "--num-images must be at least 1, and all prompts together at most 10000 pictures; "
            "got 0",
            2,
        ),
        (
            _EXPORTED,
            "sample --prompt cat --out msfp-run",
            "msfp-run exists already; use --overwrite",
            1,
        ),
        (
            _EXPORTED,
            "calibrate msfp-run/export --run new",
            "unet is quantized already; calibrate the full-precision model",
            2,
        ),
        (None, "calibrate --keep *:none", "--keep '*:none' leaves every layer in floating", 2),
        (_EXPORTED, "sample --prompt cat --dtype half", "unknown --dtype 'half'", 2),
        (
            _EXPORTED,
            "sample --prompt cat --device abacus",
            "device 'abacus' cannot be used here",
            1,
        ),
        (
            _EXPORTED,
            "sample {unconditional_export} --prompt cat",
            "this pipeline takes no prompt; leave --prompt out",
            2,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.split()[0] in COMMANDS else "",
)
def test_wrong_input_is_one_helpful_line(
    stage_of: str | None,
    command: str,
    message: str,
    exit_code: int,
    msfp: Invoke,
    stage: Callable[..., Path],
    tiny: Callable[[str], Path],
    tiny_chained: Chained,
    quick: None,
) -> None:
    stage("calibrate" if stage_of in (None, "uncalibrated") else stage_of)
    if stage_of == "uncalibrated":
        Path("msfp-run").mkdir()
    Path("empty.txt").write_text(" \n")
    before = sorted(Path(".").rglob("*"))
    places = {
        "unconditional": tiny("DDIMPipeline"),
        "classes": tiny("DiTPipeline"),
        "unconditional_export": tiny_chained.export,
    }
    done = msfp(*shlex.split(command.format(**places)))
    assert message.format(**places) in only_line(done, exit_code)
    files = [
        path
        for path in sorted(Path(".").rglob("*"))
        if path not in before and path.suffix == ".safetensors"
    ]
    assert files == []


def test_pipeline_without_a_denoiser_is_one_helpful_line(
    msfp: Invoke, tiny_pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    # diffusers saves no pipeline without its parts, hence this one is made here.
    tiny_pipe.register_modules(unet=None)
    monkeypatch.setattr(
        "msfp_cli.calibration.calibrate.load_pipeline",
        lambda source, device, streamed: tiny_pipe,
    )
    assert only_line(msfp("calibrate"), 1).startswith("DDIMPipeline has no denoiser")


@pytest.mark.parametrize(
    "command",
    [
        "calibrate --steps 0",
        "calibrate --batch-size 0",
        "calibrate --wieghts 4",
        "sample --steps x",
        "paint",
    ],
)
def test_wrong_command_line_is_named_with_exit_code_two(command: str, msfp: Invoke) -> None:
    result = msfp(*command.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert command.split()[1 if " " in command else 0] in result.stderr


@pytest.mark.parametrize("text", ["[bold]x[/bold]", ":cat:", "back\\[slash]"])
def test_errors_repeat_what_was_typed(text: str, msfp: Invoke) -> None:
    assert f"cannot read prompts from {text}: " in only_line(
        msfp("calibrate", "--prompts", text), 2
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_full_disk_is_one_helpful_line(
    error: Exception, msfp: Invoke, tiny_source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    result = msfp("calibrate", tiny_source.model, *QUICKLY)
    assert (
        only_line(result, 1)
        == "the disk is full; free some space and run the same command to go on"
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EFBIG, "File too large"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system", "place"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
    ids=str,
)
def test_place_that_cannot_be_written_is_one_helpful_line(
    error: Exception, msfp: Invoke, tiny_source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    place = getattr(error, "filename", None) or "msfp-run/recording/00000.safetensors"
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    line = only_line(msfp("calibrate", tiny_source.model, *QUICKLY), 1)
    assert line.startswith(f"{place}: ")
    assert line.endswith(
        "; check the path, its disk and your rights to it, and run the same command to go on"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory; give a smaller --batch-size"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            "out of memory; give a smaller --batch-size",
        ),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            "out of memory; give a smaller --batch-size",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; give a smaller"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "too many open files; raise their"),
        (RuntimeError("can't start new thread"), "no more threads or processes may be started; "),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no more threads or"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            "No usable temporary directory found in ['/tmp']; check the path, its disk and your ",
        ),
        (
            ArithmeticError("odd\nand more"),
            "ArithmeticError: odd (run `msfp --debug ...` for the traceback",
        ),
        (KeyboardInterrupt(), "stopped; what was finished is kept, run the same command to go on"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unexpected_error_is_one_line(
    error: BaseException,
    message: str,
    msfp: Invoke,
    tiny_source: ModelSource,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(pipe: object, batch_size: int = 1) -> None:
        raise error

    monkeypatch.setattr(DDIMPipeline, "__call__", fail)
    assert only_line(msfp("calibrate", tiny_source.model, *QUICKLY), 1).startswith(message)


def test_debug_lets_errors_through(msfp: Invoke) -> None:
    assert isinstance(msfp("--debug", "status").exception, RunError)


def test_debug_shows_a_traceback_and_nothing_else_does() -> None:
    for options, wanted in (((), False), (("--debug",), True)):
        command = [sys.executable, "-m", "msfp_cli", *options, "calibrate", "--weights", "9"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert ("Traceback" in done.stderr) == wanted
        assert "--weights '9' is out of range" in done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize("options", [(), ("--json",)], ids=str)
def test_reader_that_has_enough_is_not_an_error_to_explain(
    options: tuple[str, ...], tiny_chained: Chained
) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does when it has enough
    run = ("--run", str(tiny_chained.run.directory))
    command = [sys.executable, "-m", "msfp_cli", "status", *options, *run]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("options", [("--version",), ("--help",), ("status", "-h"), ("status",)])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it takes the place of a full disk")
def test_stdout_that_is_full_is_named_in_one_line(
    options: tuple[str, ...], unbuffered: str, tiny_chained: Chained
) -> None:
    run = ("--run", str(tiny_chained.run.directory)) if options == ("status",) else ()
    command = [sys.executable, "-m", "msfp_cli", *options, *run]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert re.fullmatch("error: standard output cannot be written .No space.*\n", done.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="it is the completion of bash")
def test_completion_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    (tmp_path / ".bashrc").mkdir()
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    command = [sys.executable, "-m", "msfp_cli", "--install-completion", "bash"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / '.bashrc'}: Is a directory; check the path")


CLOSED = """
import os, sys
for number in range(3):
    os.close(number)
sys.stdin = sys.stdout = sys.stderr = None
from msfp_cli.__main__ import open_missing_streams
open_missing_streams()
with open(sys.argv[1], "w") as file:
    file.write(f"{file.fileno() > 2}")
    file.flush()
    os.write(2, b"a warning of a library")
    os.system("echo noise; cat; echo noise >&2")
    print("a result")
    print("an error", file=sys.stderr)
    file.write(f" {sys.stdin.read()!r}")
"""


def test_streams_that_a_daemon_has_closed_lead_nowhere(tmp_path: Path) -> None:
    """A file that is being written would take their numbers, and what is printed."""
    path = tmp_path / "weights"
    done = subprocess.run([sys.executable, "-c", CLOSED, str(path)])
    assert (done.returncode, path.read_text()) == (0, "True ''")


def test_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"msfp {__version__}\n"


def _seconds(*arguments: str) -> float:
    """Return the shortest of three runs of Python in a new process."""
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        durations.append(time.perf_counter() - start)
    return min(durations)


def test_help_answers_within_half_a_second() -> None:
    # Importing what draws the help takes 0.1 s on an idle machine; a busy one gets as much longer
    # as it is slower.
    slowness = max(1.0, _seconds("-c", "import rich.markdown, typer") / 0.15)
    assert _seconds("-m", "msfp_cli", "--help") < 0.5 * slowness


def test_help_loads_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom msfp_cli.commands.app import app\n"
        f"for command in {COMMANDS}:\n"
        "    assert CliRunner().invoke(app, [command, '-h']).exit_code == 0\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "msfp_cli" in done.stdout.split()
    assert not {"torch", "diffusers", "transformers", "numpy"} & set(done.stdout.split())


def test_calibrate_says_which_rules_match_no_layer(
    msfp: Invoke, stage: Callable[..., Path], quick: None
) -> None:
    stage("calibrate")
    result = msfp("calibrate", "--keep", "nomatch:8", "--prompts", "prompts.txt")
    assert result.exit_code == 0, result.stderr
    assert "--keep 'nomatch:8' matches no layer of this model" in result.stderr
