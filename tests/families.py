"""Try the whole chain on every family of diffusers that can be built from tiny parts.

``python tests/families.py CHECKOUT`` writes docs/families.md. CHECKOUT is a checkout of diffusers
with its folder ``tests``: the tests of its pipelines say how each is built from tiny random parts
and called, so a new family costs no line here. What they take from the hub (tokenizers, a few
encoders) is replaced by what `tiny_pipelines` makes, so nothing is downloaded.

``--only PATTERN`` tries the modules of tests whose name matches, and prints instead of writing.
"""

import argparse
import importlib.util
import inspect
import multiprocessing
import os
import re
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
SECONDS = 300  # for all pipelines of a module
SIZES = ("height", "width", "num_frames")
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "vocab_size": 1103}


def replacements() -> dict[str, Callable[[], Any]]:
    """Return what takes the place of the hub's tiny parts, by a piece of their name."""
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

    tokenizers = {"gemma": llama, "llama": llama, "Llama": llama, "Gemma": llama, "glm": llama}
    return {
        **tokenizers,
        "clip": tiny._clip_tokenizer,
        "t5": tiny._t5_tokenizer,
        "T5": tiny._t5_tokenizer,
        "Qwen": qwen,
        "Bert": tiny._bert_tokenizer,
    }


def patch_hub() -> None:
    """Let tokenizers and the T5 encoder come from here instead of from the hub."""
    import transformers

    parts = replacements()

    def tokenizer_of(cls: type, name: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if Path(name).exists():
            return originals[cls.__name__](name, *args, **kwargs)
        for piece, make in parts.items():
            if piece in name:
                return make()
        raise LookupError(f"no stand-in for {name}")

    originals = {}
    base = transformers.PreTrainedTokenizerBase
    for cls in (base, transformers.AutoTokenizer):
        originals[cls.__name__] = cls.from_pretrained

    def of_base(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if Path(str(name)).exists():
            return originals[base.__name__].__func__(cls, name, *args, **kwargs)
        return tokenizer_of(cls, str(name))

    def of_auto(name: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if Path(str(name)).exists():
            return originals["AutoTokenizer"](name, *args, **kwargs)
        return tokenizer_of(transformers.AutoTokenizer, str(name))

    base.from_pretrained = classmethod(of_base)
    transformers.AutoTokenizer.from_pretrained = of_auto
    _patch_t5(transformers)


def _patch_t5(transformers: Any) -> None:  # noqa: ANN401 (a module)
    config_of = transformers.AutoConfig.from_pretrained
    encoder_of = transformers.T5EncoderModel.from_pretrained

    def config(name: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if "tiny-random-t5" in str(name):
            return transformers.T5Config(**T5)
        return config_of(name, *args, **kwargs)

    def encoder(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if "tiny-random-t5" in str(name):
            return cls(transformers.T5Config(**T5))
        return encoder_of.__func__(cls, name, *args, **kwargs)

    transformers.AutoConfig.from_pretrained = config

    def language_model(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if "tiny-random-Llama" in str(name):
            return cls(transformers.LlamaConfig(**LLAMA))
        return language_model_of.__func__(cls, name, *args, **kwargs)

    def unet(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if "consistency-models-test" in str(name):
            return tiny_pipelines._unconditional_unet()
        return unet_of.__func__(cls, name, *args, **kwargs)

    from diffusers import UNet2DModel

    import tiny_pipelines

    language_model_of = transformers.LlamaForCausalLM.from_pretrained
    unet_of = UNet2DModel.from_pretrained
    transformers.T5EncoderModel.from_pretrained = classmethod(encoder)
    transformers.LlamaForCausalLM.from_pretrained = classmethod(language_model)
    UNet2DModel.from_pretrained = classmethod(unet)


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


def try_family(builder: type) -> dict[str, str]:
    """Return what came of each step: ``yes``, or the last line of an error."""
    instance = builder.__new__(builder)
    results = {}
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            pipe = builder.pipeline_class(**called(instance.get_dummy_components))
            inputs = called(instance.get_dummy_inputs)
            pipe.save_pretrained("model")
        except Exception as error:
            return {"build": _line(error)}
        for step, action in steps_of(inputs):
            try:
                action()
                results[step] = "yes"
            except Exception as error:
                if os.environ.get("FAMILIES_TRACE"):
                    traceback.print_exc()
                results[step] = _line(error)
                break
    return results


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
        report.send((name.rpartition(".")[2], {"build": _line(error)}))
        return
    for builder in builders:
        report.send((builder.pipeline_class.__name__, try_family(builder)))


def outcomes(checkout: Path, only: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each pipeline and what came of it, each module of tests in a process of its own."""
    context = multiprocessing.get_context("fork")  # what is imported is imported once
    for path in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        name = ".".join(path.relative_to(checkout).with_suffix("").parts)
        if not re.search(only, name) or "pipeline_class" not in path.read_text():
            continue
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=try_module, args=(name, sender))
        process.start()
        sender.close()
        yield from _received(receiver, path.stem)
        process.kill()
        process.join()


def _received(receiver: Connection, name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what a process reports until it ends or takes too long."""
    end = time.monotonic() + SECONDS
    while True:
        if not receiver.poll(max(0.0, end - time.monotonic())):
            yield name, {"build": f"it took more than {SECONDS} s"}
            return
        try:
            yield receiver.recv()
        except EOFError:
            return


def page(results: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page of a table."""
    import diffusers
    import torch
    import transformers

    versions = ", ".join(
        f"{each.__name__} {each.__version__.partition('+')[0]}"
        for each in (diffusers, transformers, torch)
    )
    built = {name: each for name, each in results.items() if "build" not in each}
    passed = [name for name, each in built.items() if list(each.values()) == ["yes"] * len(STEPS)]
    lines = [
        "# Families",
        "",
        "Pipelines of diffusers that its own tests build from tiny random parts, through the whole "
        f"chain, one picture a call. {len(passed)} of the {len(built)} that were tried pass each "
        f"step. Written by `python tests/families.py CHECKOUT` with {versions}.",
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
    parser.add_argument("--write", action="store_true", help="write the page with --only, too")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout))
    for missing in ("requests_mock", "parameterized"):  # which only tests call
        if importlib.util.find_spec(missing) is None:
            sys.modules[missing] = MagicMock()
    patch_hub()
    for each in ("tests.pipelines.test_pipelines_common", "msfp_cli.commands.app"):
        importlib.import_module(each)
    results = {}
    for name, result in outcomes(arguments.checkout, arguments.only):
        results[name] = result
        print(name, result, flush=True)
        if arguments.write or not arguments.only:  # a run that is stopped leaves what it has
            PAGE.write_text(page(results), "utf-8")


if __name__ == "__main__":
    main()
