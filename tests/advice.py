"""Advice that messages give: how tests follow it, or why none does.

A `Trouble` is made in a copy of a finished run, the command has to say the advice, the advice is
followed to the letter, and then the command has to work. `test_advice.py` looks through the source
for messages that name a command or an option, and fails for one that is nowhere in these tables.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kills import commands

Words = tuple[str, ...]
Step = Words | Callable[[Path], object]  # a command, or what a user does by hand

MODEL = Path("model")
WEIGHTS = "diffusion_pytorch_model.safetensors"
RUN = Path("msfp-run")
COMMANDS = commands(MODEL, RUN)
CALIBRATE = COMMANDS["calibrate"]
FINETUNE = COMMANDS["finetune"]
EXPORT = COMMANDS["export --overwrite"]
SAMPLE = ("sample", "--steps", "2", "--out", "pictures", "--run", str(RUN))
EVALUATE = COMMANDS["evaluate"]
REPORT = ("report", "--out", "page", "--run", str(RUN))


def damage(name: str) -> Callable[[Path], object]:
    """Return what cuts the end off a file of the run."""

    def cut(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])

    return cut


def delete(name: str) -> Callable[[Path], object]:
    """Return what deletes a file or a directory of the run."""

    def remove(run: Path) -> None:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def put(name: str, text: str = "mine") -> Callable[[Path], object]:
    """Return what puts a file into the run."""
    return lambda run: (run / name).write_text(text)


def move_away(name: str) -> Callable[[Path], object]:
    """Return what moves a file out of the run."""
    return lambda run: (run / name).rename(run.parent / "moved")


def edit_config(run: Path) -> None:
    """Change the export's denoiser on purpose."""
    path = run / "export" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_eps": 1e-3}))


def with_option(words: Words, *option: str) -> Words:
    """Return a command with another option."""
    return (*words, *option)


def without(words: Words, option: str) -> Words:
    """Return a command without an option and its value."""
    at = words.index(option)
    return (*words[:at], *words[at + 2 :])


@dataclass(frozen=True)
class Trouble:
    """A message with advice.

    Arguments:
        says: a part of it, as it is in the source.
        command: that says it.
        prepare: makes the trouble, in the order given.
        follow: the advice.
        then: what works now; None is the command itself.
    """

    says: str
    command: Words
    prepare: tuple[Step, ...] = ()
    follow: tuple[Step, ...] = ()
    then: Words | None = None


AGAIN = "run the same `msfp calibrate` again, with --overwrite"
OVERWRITE = with_option(CALIBRATE, "--overwrite")
RESTART = with_option(FINETUNE, "--restart")
OTHER_SEED = with_option(without(CALIBRATE, "--run"), "--seed", "5")
EVALUATE_AGAIN = with_option(EVALUATE, "--overwrite")
OTHER_PICTURES = with_option(EVALUATE, "--seed", "3")

TROUBLES = (
    Trouble(AGAIN, EXPORT, (damage("calibration/calibration.json"),), (OVERWRITE,)),
    Trouble(AGAIN, EXPORT, (delete("calibration/calibration.json"),), (OVERWRITE,)),
    Trouble(AGAIN, EXPORT, (damage("calibration/scales.safetensors"),), (OVERWRITE,)),
    Trouble(AGAIN, EXPORT, (delete("calibration/scales.safetensors"),), (OVERWRITE,)),
    Trouble(
        AGAIN,
        EXPORT,
        (
            damage("calibration/msfp.json"),
            damage("calibration/calibration.json"),
        ),
        (OVERWRITE,),
    ),
    Trouble(AGAIN, RESTART, (damage("recording/recording.json"),), (OVERWRITE,)),
    Trouble(AGAIN, RESTART, (delete("recording/recording.json"),), (OVERWRITE,)),
    Trouble(AGAIN, RESTART, (delete("recording"),), (OVERWRITE,)),
    Trouble(AGAIN, RESTART, (delete("recording/00000.safetensors"),), (OVERWRITE,)),
    Trouble(
        "; run `msfp calibrate` first",
        EXPORT,
        (delete("calibration"),),
        (CALIBRATE,),
    ),
    Trouble(
        "`msfp calibrate` makes one, or give --run",
        without(EXPORT, "--run"),
        (lambda run: run.rename("elsewhere"),),
        (lambda run: Path("elsewhere").rename("other"),),
        with_option(without(EXPORT, "--run"), "--run", "other"),
    ),
    Trouble("; run `msfp export` first", SAMPLE, (delete("export"),), (COMMANDS["export"],)),
    Trouble("use --overwrite to replace it", COMMANDS["export"], (), (), EXPORT),
    Trouble(
        "or choose another path",
        COMMANDS["export"],
        (),
        (),
        with_option(COMMANDS["export"], "--out", "other"),
    ),
    Trouble(
        "was not written by msfp and is not replaced; move it away",
        EXPORT,
        (put("export/notes.txt"),),
        (move_away("export/notes.txt"),),
    ),
    Trouble(
        "delete it; `msfp export --overwrite` writes it again",
        SAMPLE,
        (damage("run.json"),),
        (delete("run.json"), EXPORT),
    ),
    Trouble(
        "delete it and run the same `msfp calibrate` again, with --overwrite",
        RESTART,
        (damage("recording/00000.safetensors"),),
        (delete("recording/00000.safetensors"), OVERWRITE),
    ),
    Trouble(
        "was recorded with other settings",
        OTHER_SEED,
        (delete("calibration"),),
        (),
        (*OTHER_SEED, "--overwrite"),
    ),
    Trouble(
        "use --overwrite, or another --run",
        OTHER_SEED,
        (delete("calibration"),),
        (),
        (*OTHER_SEED, "--run", "other"),
    ),
    Trouble(
        "has lost its",
        OTHER_SEED,
        (delete("calibration"), delete("recording/recording.json")),
        (),
        (*OTHER_SEED, "--overwrite"),
    ),
    Trouble(
        "run `msfp finetune --restart`",
        COMMANDS["export --overwrite"][:1] + ("--overwrite", "--run", str(RUN)),
        (damage("finetune/unet.safetensors"),),
        (RESTART,),
    ),
    Trouble("or --restart to begin again", with_option(FINETUNE, "--seed", "4"), (), (), RESTART),
    Trouble(
        "; run `msfp finetune` first",
        ("inspect", "--run", str(RUN)),
        (delete("finetune"),),
        (FINETUNE,),
    ),
    Trouble(
        "leave --resume out to begin",
        with_option(FINETUNE, "--resume"),
        (delete("finetune"),),
        (),
        FINETUNE,
    ),
    *(
        Trouble(
            "or export it again with --overwrite", SAMPLE, (damage(f"export/{name}"),), (EXPORT,)
        )
        for name in ("unet/config.json", f"unet/{WEIGHTS}", "model_index.json", "msfp.json")
    ),
    Trouble(
        "or export it again with --overwrite",
        SAMPLE,
        (delete("export/unet/config.json"),),
        (EXPORT,),
    ),
    Trouble(
        "run `msfp export --reseal DIR`",
        SAMPLE,
        (edit_config,),
        (("export", "--reseal", str(RUN / "export")),),
    ),
    Trouble(
        "move it away",
        ("export", "--reseal", str(RUN / "export")),
        (lambda run: os.mkfifo(run / "export" / "unet" / "pipe"),),
        (move_away("export/unet/pipe"),),
    ),
    Trouble(
        "holds pictures of other settings or of another model; use --overwrite",
        OTHER_PICTURES,
        (delete("evaluation/asked.json"), delete("evaluation/measured")),
        (),
        with_option(OTHER_PICTURES, "--overwrite"),
    ),
    Trouble("; run `msfp evaluate` first", REPORT, (delete("evaluation"),), (EVALUATE,)),
    Trouble(
        "run the same `msfp evaluate` again",
        REPORT,
        (damage("evaluation/evaluation.json"),),
        (EVALUATE,),
    ),
    Trouble("holds an evaluation with other settings", OTHER_PICTURES, (), (), EVALUATE_AGAIN),
    Trouble(
        "use --overwrite to evaluate again",
        EVALUATE,
        (damage("evaluation/asked.json"),),
        (),
        EVALUATE_AGAIN,
    ),
    Trouble(
        "use --overwrite to draw the pictures again",
        EVALUATE,
        (damage("evaluation/pictures/full/gallery.json"), delete("evaluation/measured")),
        (),
        EVALUATE_AGAIN,
    ),
    Trouble(
        "delete it and run the same `msfp evaluate` again",
        EVALUATE,
        (
            damage("evaluation/pictures/full/00000.safetensors"),
            delete("evaluation/measured"),
        ),
        (delete("evaluation/pictures/full/00000.safetensors"),),
    ),
    Trouble("leave --prompt out", with_option(SAMPLE, "--prompt", "a cat"), (), (), SAMPLE),
    Trouble("try --device cpu", with_option(SAMPLE, "--device", "gpu"), (), (), SAMPLE),
    Trouble(
        "write PATTERN:BITS, for instance",
        with_option(CALIBRATE, "--keep", "conv_in"),
        (),
        (),
        with_option(CALIBRATE, "--keep", "conv_in:8", "--overwrite"),
    ),
    Trouble(
        "give --weights or --activations some bits",
        with_option(OVERWRITE, "--weights", "none", "--activations", "none"),
        (),
        (),
        with_option(OVERWRITE, "--weights", "none", "--activations", "4"),
    ),
    Trouble(
        "names no format with the bits of --weights or --activations",
        with_option(without(OVERWRITE, "--formats"), "--formats", "e4m3"),
        (),
        (),
        with_option(without(OVERWRITE, "--formats"), "--formats", "e4m3", "--activations", "8"),
    ),
    Trouble(
        "give a pattern that matches fewer",
        with_option(OVERWRITE, "--keep", "*:none"),
        (),
        (),
        with_option(OVERWRITE, "--keep", "conv_in:none"),
    ),
    Trouble(
        "or raise --max-recording-gib",
        with_option(CALIBRATE, "--max-recording-gib", "0.000001", "--run", "other"),
        (),
        (),
        with_option(CALIBRATE, "--max-recording-gib", "1", "--run", "other"),
    ),
    Trouble(
        "--num-images must be at least 1",
        with_option(SAMPLE, "--num-images", "1000000000"),
        (),
        (),
        with_option(SAMPLE, "--num-images", "2"),
    ),
    Trouble(
        "is not an exported pipeline: it has no model_index.json; `msfp export` makes one",
        ("sample", str(RUN / "calibration"), "--out", "pictures", "--steps", "2"),
        (),
        (EXPORT,),
        SAMPLE,
    ),
    Trouble(
        "run `msfp calibrate model` and `msfp export`",
        ("sample", str(MODEL), "--out", "pictures"),
        (),
        (OVERWRITE, EXPORT),
        SAMPLE,
    ),
)

# Messages whose advice is followed in a test of its own, or which no test can follow.
ELSEWHERE = {
    "choose another path for --out": "tests/test_run.py",
    "is a pipeline, but msfp did not export it": "tests/commands/test_app.py",
    "which the model does not have; give another class": "tests/streaming/test_quantize.py",
    "has no use for the model's": "tests/streaming/test_quantize.py",
    "may only be read; give a directory of yours with --out": "tests/checkpoint/test_export.py",
    "give another --run": "tests/commands/test_wrong_inputs.py",
    "use --overwrite to begin again, or choose another path": "tests/test_sample.py",
    "--input-lift": "tests/calibration/test_input_lift.py",
    "write NAME:weights=BITS": "tests/calibration/test_also.py",
    "is quantized already; load it in full precision": "tests/calibration/test_also.py",
    "unknown --preset {}; choose": "tests/calibration/test_recipe.py",
    "--images": "tests/pipelines/test_pictures.py",
    "makes one picture a call; give --batch-size 1": "tests/pipelines/test_pictures.py",
    "give more --steps, or save the pipeline without it": "tests/recording/test_record.py",
    "`msfp export` exports the calibration": "tests/finetuning/test_task.py",
    "give --variant": "tests/pipelines/test_loading.py",
    "leave --variant out": "tests/pipelines/test_loading.py",
    "give at least --steps": "tests/pipelines/test_sampling.py",
    "give a class such as StableDiffusionImg2ImgPipeline": "tests/pipelines/test_pictures.py",
    "leaves it out": "tests/calibration/test_estimate.py",
    "--kernel openvino may be faster": "tests/commands/test_inspect.py",
    "fewer --num-images or --steps": "tests/recording/test_record.py",
    "have changed since {} was begun; use --overwrite": "tests/evaluation/test_gallery.py",
    "needs the package {}; install it with `pip install {}`": "tests/pipelines/test_sampling.py",
    "calibrate with another --pipeline": "tests/recording/test_record.py",
    "--max-memory": "tests/calibration/test_estimate.py",
    "timesteps that the model was trained with; give fewer": "tests/commands/test_wrong_inputs.py",
    "it is not UTF-8; give it in a file with --prompts": "tests/commands/test_wrong_inputs.py",
    "is for layers whose weights and inputs are quantized": "tests/calibration/test_transforms.py",
    "--weight-groups {} is not a number; choose": "tests/calibration/test_recipe.py",
    "set MSFP_CACHE to a directory of yours, or store it": "tests/engines/test_conversions.py",
    "unknown --engine {}; choose": "tests/checkpoint/test_engine.py",
    "run the same command to go on": "tests/troubles.py",
    "run the same command again": "tests/kills.py",
    "names no role of layers": "tests/calibration/test_recipe.py",
    "prompts alone, with --pipeline CLASS": "tests/pipelines/test_pictures.py",
    "as another pipeline, with --pipeline CLASS": "tests/recording/test_probe.py",
    "matches no layer": "tests/calibration/test_keep.py",
    "give it with --against": "tests/evaluation/test_identity.py",
    "use --compare none": "tests/evaluation/test_models.py",
    "use --extractor squeezenet": "tests/evaluation/features/test_extractors.py",
    "was replaced while it was evaluated": "tests/evaluation/test_evaluate.py",
    "unknown --compare": "tests/evaluation/test_evaluate.py",
    "give more with --num-images": "tests/evaluation/test_evaluate.py",
    "leave --gradient-checkpointing out": "tests/finetuning/test_finetune.py",
    "give --gradient-checkpointing": "tests/finetuning/test_finetune.py",
    "--restart begins again": "tests/finetuning/test_finetune.py",
    "lower --learning-rate": "tests/finetuning/test_trainer.py",
    "lower --learning-rate, and --restart": "tests/finetuning/test_trainer.py",
    "Give a --learning-rate a third of this one": "tests/finetuning/test_trainer.py",
    "or give another --calls-per-update and --restart": "tests/finetuning/test_distributed.py",
    "give --hub-size 1": "tests/finetuning/test_lora.py",
    "use --loss plain": "tests/pipelines/test_denoising_factor.py",
    "so there is nothing to train; run `msfp export`": "tests/finetuning/test_finetune.py",
    "is not the recording that the calibration was made from": "tests/finetuning/test_finetune.py",
    "is of another model than": "tests/finetuning/test_finetune.py",
    "was changed since it was calibrated": "tests/finetuning/test_finetune.py",
    "measures it as it is": "tests/report/test_report.py",
    "is of an earlier calibration": "tests/test_status.py",
    " --prompt 'a red dress'": "tests/streaming/test_quantize.py",
    " --prompt 1": "tests/streaming/test_quantize.py",
    "--reseal writes nothing but the seal": "tests/commands/test_wrong_inputs.py",
    "holds no call of": "tests/finetuning/test_batches.py",
    "leave --prompts out": "tests/pipelines/test_sampling.py",
    "give --prompt or --prompts FILE": "tests/test_sample.py",
    "no prompt; give at least one": "tests/test_sample.py",
    "on that": "tests/checkpoint/test_guests.py",
    "is not a text encoder of this pipeline": "tests/streaming/test_quantize.py",
    "--num-processes 1 needs less": "tests/commands/test_launch.py",
    "starts none, as WORLD_SIZE={} says": "tests/commands/test_launch.py",
    "has a smaller error": "tests/test_status.py",
    "with --activations {} --overwrite": "tests/commands/test_app.py",
    " --run {}": "tests/test_run.py",
    " --prompt {}": "tests/test_status.py",
    "msfp finetune --restart": "tests/test_status.py",
    "msfp export --overwrite": "tests/test_status.py",
    "msfp evaluate --overwrite": "tests/test_status.py",
    "msfp report --overwrite": "tests/test_status.py",
}
BEYOND = {
    "install it with `pip install 'msfp[openvino]'`": "it takes a network",
    "upgrade with `pip install -U msfp`": "there is no newer msfp",
    "try --dtype float32": "it takes a model that overflows in a narrow type",
    "calibrate again with --dtype float32": "it takes a model that overflows in a narrow type",
    "use --dtype float32": "it takes a pipeline that makes no pictures in a narrow type",
    "out of memory; give a smaller --batch-size": "memory cannot be taken away for sure",
    "and please report it": "the advice is to write to us",
    "run `hf auth login`": "it takes an account",
    "leave --revision out for the newest": "it takes a network",
    "then run `hf auth login`": "it takes a network and an account",
    "`msfp calibrate` makes one": "every command looks for a calibration first",
}
