"""Try the whole chain on every family of diffusers that can be built from tiny parts.

``python tests/families.py CHECKOUT`` writes docs/families.md. CHECKOUT is a checkout of diffusers
with its folder ``tests``: the tests of its pipelines say how each is built from tiny random parts
and called, so a new family costs no line here. What they take from the hub (tokenizers, a few
encoders) is replaced by what `tiny_pipelines` makes, so nothing is downloaded.

One module of each family comes first, then its variants, until ``--minutes`` are over.
``--only PATTERN`` tries the modules of tests whose name matches, and prints instead of writing.
"""

import argparse
import importlib.util
import inspect
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

os.environ["HF_HUB_OFFLINE"] = "1"

STEPS = ("record, calibrate", "fine-tune", "export", "reload, sample")
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SECONDS = 100  # of the processor, for a pipeline
PATIENCE = 900  # seconds to wait for a step of one, or for what a module of tests imports
SIZES = ("height", "width", "num_frames")
# What the chain passes to a pipeline.
PASSED = (*SIZES, "prompt", "generator", "num_inference_steps", "guidance_scale", "output_type")
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "vocab_size": 1103}


def tokenizers() -> dict[str, Callable[[], Any]]:
    """Return what takes the place of the hub's tiny tokenizers, by a piece of their name."""
    import transformers

    import tiny_pipelines as tiny

    def qwen() -> Any:  # noqa: ANN401 (a tokenizer)
        letters = {letter: i for i, letter in enumerate(sorted(tiny.ByteLevel.alphabet()))}
        tokenizer = transformers.Qwen2Tokenizer(vocab=letters, merges=[])
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        return tokenizer

    def llama() -> Any:  # noqa: ANN401 (a tokenizer)
        tokenizer = qwen()
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def glm() -> Any:  # noqa: ANN401 (a tokenizer that begins each text with a mark)
        from tokenizers.processors import TemplateProcessing

        backend = qwen().backend_tokenizer
        marks = [("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
        backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=marks)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<|endoftext|>", padding_side="left"
        )

    return {
        **dict.fromkeys(("gemma", "llama", "Llama", "Gemma", "hunyaunvideo"), llama),
        "glm": glm,
        "clip": tiny._clip_tokenizer,
        "t5": tiny._t5_tokenizer,
        "T5": tiny._t5_tokenizer,
        "Qwen": qwen,
        "Bert": tiny._bert_tokenizer,
    }


def models() -> list[tuple[type, str, Callable[[], Any]]]:
    """Return what takes the place of the hub's tiny models: class, a piece of the name, maker."""
    import transformers as t
    from diffusers import UNet2DModel

    import tiny_pipelines

    bert = t.BertConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=1124,
    )
    return [
        (t.AutoConfig, "tiny-random-t5", lambda: t.T5Config(**T5)),
        (t.T5EncoderModel, "tiny-random-t5", lambda: t.T5EncoderModel(t.T5Config(**T5))),
        (t.UMT5EncoderModel, "umt5", lambda: t.UMT5EncoderModel(t.UMT5Config(**T5))),
        (t.BertModel, "BertModel", lambda: t.BertModel(bert)),
        (t.LlamaForCausalLM, "Llama", lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA))),
        (UNet2DModel, "consistency-models-test", tiny_pipelines._unconditional_unet),
    ]


def patch_hub() -> None:
    """Let tokenizers and some models come from here instead of from the hub."""
    import transformers

    makers = tokenizers()
    for cls in (transformers.PreTrainedTokenizerBase, transformers.AutoTokenizer):
        for piece, make in makers.items():
            _replace(cls, piece, make)
    for cls, piece, make in models():
        _replace(cls, piece, make)
    _replace(transformers.AutoProcessor, "Qwen", lambda: processor(makers["Qwen"]()))


def processor(tokenizer: Any) -> Any:  # noqa: ANN401 (of transformers)
    """Return a processor of texts and pictures."""
    import transformers

    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )


def _replace(cls: Any, piece: str, make: Callable[[], Any]) -> None:  # noqa: ANN401 (a class)
    """Let ``from_pretrained`` make what is not there and has a piece in its name."""
    original = cls.from_pretrained.__func__

    def from_pretrained(kind: type, name: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if piece in str(name) and not Path(str(name)).exists():
            return make()
        return original(kind, name, *args, **kwargs)

    cls.from_pretrained = classmethod(from_pretrained)


def pass_by_default(pipeline: type, inputs: Mapping[str, Any]) -> None:
    """Make the arguments that a tiny pipeline needs the defaults of its class.

    Such are the number of tokens, or the layers that a text encoder's output is taken from. What
    the chain passes itself is not among them.
    """
    function = inspect.unwrap(pipeline.__call__)
    parameters = list(inspect.signature(function).parameters.values())
    names = [each.name for each in parameters if each.default is not inspect.Parameter.empty]
    defaults = dict(zip(names, function.__defaults__ or (), strict=False))
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    for name in names:
        is_own = name in inputs and (name not in PASSED or inputs[name] is None)
        if is_own and isinstance(inputs[name], plain):
            defaults[name] = inputs[name]
    function.__defaults__ = tuple(defaults.values())


def builders_of(module: Any) -> Iterator[type]:  # noqa: ANN401 (a module of diffusers' tests)
    """Yield the classes of a test module that build a pipeline, one for each pipeline."""
    done = set()
    for each in vars(module).values():
        own = inspect.isclass(each) and each.__module__ == module.__name__
        pipeline = getattr(each, "pipeline_class", None) if own else None
        if inspect.isclass(pipeline) and pipeline not in done:
            done.add(pipeline)
            yield each


def called(method: Callable[..., Any]) -> Any:  # noqa: ANN401 (components or inputs)
    """Call a builder's method; those of older tests take a device."""
    takes_device = "device" in inspect.signature(method).parameters
    return method("cpu") if takes_device else method()


def stop(*_: object) -> None:
    """End a pipeline that takes too long."""
    raise TimeoutError(f"it took more than {SECONDS} s of the processor")


def try_family(builder: type) -> Iterator[tuple[str, str]]:
    """Yield what came of each step: ``yes``, or the last line of an error."""
    instance = builder.__new__(builder)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            pipe = builder.pipeline_class(**called(instance.get_dummy_components))
            inputs = called(instance.get_dummy_inputs)
            pass_by_default(builder.pipeline_class, inputs)
            pipe.save_pretrained("model")
        except Exception as error:
            yield "build", _line(error)
            return
        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        for step, action in steps_of(inputs):
            try:
                action()
            except Exception as error:
                if os.environ.get("FAMILIES_TRACE"):
                    traceback.print_exc()
                yield step, _line(error)
                return
            yield step, "yes"


def _line(error: Exception) -> str:
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0][:150]}"


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
        "num_inference_steps": max(2, inputs.get("num_inference_steps", 2)),
        "batch_size": 1,
    }
    guidance = inputs.get("guidance_scale")
    if guidance is not None:
        settings["guidance_scale"] = float(guidance)
    takes_prompt = "prompt" in inputs
    prompts = ("a cat", "a dog") if takes_prompt else None
    options = RecordOptions(num_images=2, prompts=prompts, **settings)
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
    asked = ["a cat"] if takes_prompt else ["1"] if "class_labels" in inputs else []
    yield STEPS[3], lambda: sample_run(run, asked, Sampling(**settings), device="cpu")


def try_module(name: str, report: Connection) -> None:
    """Report what came of each pipeline of a test module."""
    if not os.environ.get("FAMILIES_TRACE"):
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    try:
        builders = list(builders_of(importlib.import_module(name)))
    except Exception as error:
        report.send((name.rpartition(".")[2], "build", _line(error)))
        return
    for builder in builders:
        pipeline = builder.pipeline_class.__name__
        report.send((pipeline, "", ""))  # it begins
        for step, result in try_family(builder):
            report.send((pipeline, step, result))


def modules_of(checkout: Path, only: str) -> list[Path]:
    """Return the modules of tests that build pipelines: first one of each family, then variants."""
    folders: dict[Path, list[Path]] = {}
    for path in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        if re.search(only, str(path)) and "pipeline_class" in path.read_text():
            folders.setdefault(path.parent, []).append(path)
    ranked = [
        (rank, path)
        for paths in folders.values()
        for rank, path in enumerate(sorted(paths, key=lambda each: (len(each.name), each)))
    ]
    return [path for _, path in sorted(ranked, key=lambda each: (each[0] > 0, each[1]))]


def outcomes(checkout: Path, only: str, minutes: float) -> Iterator[tuple[str, str, str]]:
    """Yield each pipeline, a step, and what came of it.

    Each module of tests has a process of its own, which is ended when it hangs.

    Arguments:
        minutes: after which no further module is begun.
    """
    context = multiprocessing.get_context("fork")  # what is imported is imported once
    end = time.monotonic() + 60 * minutes
    for path in modules_of(checkout, only):
        if time.monotonic() > end:
            yield path.stem, "build", f"not begun after {minutes:g} minutes"
            continue
        name = ".".join(path.relative_to(checkout).with_suffix("").parts)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=try_module, args=(name, sender))
        process.start()
        sender.close()
        yield from _received(receiver, path.stem)
        process.kill()
        process.join()


def _received(receiver: Connection, name: str) -> Iterator[tuple[str, str, str]]:
    """Yield what a process reports until it ends or is silent for too long."""
    began = False
    done = 0
    while receiver.poll(PATIENCE):
        try:
            pipeline, step, result = receiver.recv()
        except EOFError:
            return
        if step:
            done += 1
            yield pipeline, step, result
        else:  # a pipeline begins
            name = pipeline
            began = True
            done = 0
    step = STEPS[min(done, len(STEPS) - 1)] if began else "build"
    yield name, step, f"nothing came for {PATIENCE} s"


def page(results: Mapping[str, Mapping[str, str]], only: str) -> str:
    """Return the page of a table.

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
    built = {name: each for name, each in results.items() if "build" not in each}
    passed = [name for name, each in built.items() if list(each.values()) == ["yes"] * len(STEPS)]
    lines = [
        "# Families",
        "",
        "Pipelines of diffusers that its own tests build from tiny random parts, through the whole "
        f"chain, one picture a call. {len(passed)} of the {len(built)} that were tried pass each "
        f"step. Written by `python tests/families.py CHECKOUT{option}` with {versions}.",
        "",
        f"| pipeline | {' | '.join(STEPS)} |",
        "|---" * (len(STEPS) + 1) + "|",
    ]
    for name, each in sorted(built.items()):
        cells = [each.get(step, "") for step in STEPS]
        lines.append(f"| {name} | {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    rest = {name: each["build"] for name, each in sorted(results.items()) if "build" in each}
    lines += ["", "Not built here, where the hub is not reached:", ""]
    lines += [f"- {name}: {reason}" for name, reason in rest.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try the families, and write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=90, help="bound on the whole run")
    parser.add_argument("--write", action="store_true", help="write the page with --only, too")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout))
    for missing in ("requests_mock", "parameterized"):  # which only tests call
        if importlib.util.find_spec(missing) is None:
            sys.modules[missing] = MagicMock()
    patch_hub()
    for each in ("tests.pipelines.test_pipelines_common", "msfp_cli.commands.app"):
        importlib.import_module(each)
    results: dict[str, dict[str, str]] = {}
    for name, step, result in outcomes(arguments.checkout, arguments.only, arguments.minutes):
        results.setdefault(name, {})[step] = result
        print(name, step, result, flush=True)
        if arguments.write or not arguments.only:  # a run that is stopped leaves what it has
            PAGE.write_text(page(results, arguments.only), "utf-8")


if __name__ == "__main__":
    main()
