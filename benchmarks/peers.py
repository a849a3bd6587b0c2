"""Peers: the built-in pipeline through other quantizers that run on a CPU, and through ours; same prompts and noise.

    python benchmarks/peers.py --work DIR --run msfp-run [--num-tests 100] [--only TEXT] [--markdown
    FILE]

Every row is measured alike: relative squared error of the denoiser's output along the
full-precision trajectories, of the final latents, and PSNR of the pictures, each against full
precision from equal noise, on prompts and noise that no calibration has seen; the bytes that the
quantized denoiser's state takes; and the median time of a call. What each row is, and the peers'
settings, are in `peer_quantizers.py`.

The peers are installed into an environment that the script makes in --work, with the torch of this
one and the other pins of constraints.txt. A row is measured in a process of its own. What is there
already is not measured again, so the script resumes, and adds only what is missing or has changed
its settings. A peer that cannot be installed or fails is listed with the reason. For steady times
leave the machine alone, else leave them out with --no-times; OMP_NUM_THREADS in the environment
counts for all.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ablation import SOURCE, TEST_SEED, test_prompts
from page import put
from peer_quantizers import METHODS, Material, Method
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from msfp_cli.files import replace_file, write_text
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.denoiser import replay
from msfp_cli.pipelines.loading import (
    BUILT_IN_GUIDANCE,
    BUILT_IN_STEPS,
    load_pipeline,
    quiet_libraries,
)
from msfp_cli.pipelines.sampling import call_pipeline
from msfp_cli.pipelines.source import Sampling
from msfp_cli.recording.compare import OutputError
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.record import record_calls
from msfp_cli.recording.result import Recording

HERE = Path(__file__).resolve().parent
BATCH = 20
NEEDED = (
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "pillow",
)  # what msfp itself imports here
COLUMNS = (
    *("", "bits, weights/activations", "weights quantized", "bits a quantized weight", "MB"),
    *("output error", "final latents' error", "PSNR, dB", "seconds a call"),
)


def tests(work: Path, num_tests: int) -> Path:
    """Return where the tests of one number are kept."""
    return work / f"{num_tests}-tests"


def references(work: Path, num_tests: int) -> None:
    """Record the full-precision trajectories of the tests, and keep their final latents and pictures, once."""
    recipe = RecordRecipe(
        conditions=test_prompts()[:num_tests],
        num_inference_steps=BUILT_IN_STEPS,
        guidance_scale=BUILT_IN_GUIDANCE,
        seed=TEST_SEED,
        batch_size=BATCH,
    )
    pipe, place = load_pipeline(SOURCE, "cpu"), tests(work, num_tests)
    record_calls(pipe, SOURCE, recipe, place / "trajectories")
    if not (place / "full-precision.safetensors").exists():
        latents, pictures = sample(pipe, num_tests)
        with replace_file(place / "full-precision.safetensors") as temporary:
            save_file({"latents": latents, "pictures": pictures}, temporary)


@torch.no_grad()
def sample(pipe: Any, num_tests: int) -> tuple[Tensor, Tensor]:  # noqa: ANN401 (a diffusers pipeline)
    """Return the final latents and the pictures (0..1) of the tests."""
    prompts, latents, pictures = test_prompts()[:num_tests], [], []
    sampling = Sampling(
        num_inference_steps=BUILT_IN_STEPS, guidance_scale=BUILT_IN_GUIDANCE, seed=TEST_SEED
    )
    for first in range(0, num_tests, BATCH):
        latents.append(
            call_pipeline(
                pipe, prompts[first : first + BATCH], sampling, first=first, output_type="latent"
            )
        )
        decoded = pipe.vae.decode(latents[-1] / pipe.vae.config.scaling_factor).sample
        pictures.append(pipe.image_processor.postprocess(decoded, output_type="pt"))
    return torch.cat(latents), torch.cat(pictures)


def measure(pipe: Any, place: Path, num_tests: int) -> dict[str, float]:  # noqa: ANN401 (a diffusers pipeline)
    """Return the test figures of a quantized pipeline."""
    latents, pictures = sample(pipe, num_tests)
    wanted = load_file(place / "full-precision.safetensors")
    picture_error = (pictures - wanted["pictures"]).square().flatten(1).mean(dim=1)
    output, seconds = OutputError(), []
    for call in Recording(place / "trajectories").calls("unet"):
        began = time.perf_counter()
        result = replay(pipe.unet, call)
        seconds.append(time.perf_counter() - began)
        output.add(call.timestep, result, call.output)
    return {
        "output": output.relative(),
        "latents": float(
            (latents - wanted["latents"]).square().sum() / wanted["latents"].square().sum()
        ),
        "psnr": float((-10 * picture_error.clamp_min(1e-10).log10()).mean()),
        "seconds": statistics.median(seconds),
    }


def stored_tensors(value: Any) -> Iterator[Tensor]:  # noqa: ANN401 (an entry of a state dict)
    """Yield the plain tensors that an entry of a state dict is made of; some peers' tensors hold several."""
    if (
        isinstance(value, Tensor)
        and hasattr(value, "__tensor_flatten__")
        and type(value) is not nn.Parameter
    ):
        for name in value.__tensor_flatten__()[0]:
            yield from stored_tensors(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value


def is_float(layer: nn.Module) -> bool:
    """Whether a layer still has a plain floating-point weight; ours and the peers' layers do not."""
    weight = layer._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.is_floating_point()


def sizes(unet: nn.Module) -> dict[str, float]:
    """Return what the denoiser's state takes, and how much of it is quantized; what is not counts 4 bytes each."""
    plain = load_pipeline(SOURCE, "cpu").unet
    total = sum(parameter.numel() for parameter in plain.parameters())
    quantized = sum(
        n.weight.numel()
        for name, n in find_layers(plain).items()
        if not is_float(unet.get_submodule(name))
    )
    stored = sum(
        tensor.nbytes for entry in unet.state_dict().values() for tensor in stored_tensors(entry)
    )
    bits = 8 * (stored - 4 * (total - quantized)) / quantized if quantized else 32.0
    return {"share": quantized / total, "megabytes": stored / 1e6, "bits": bits}


def work_on(method: Method, material: Material, num_tests: int) -> None:
    """Quantize, measure, and keep the result: what the process of one row does."""
    pipe = method.quantize(load_pipeline(SOURCE, "cpu"), material, **method.options)
    pipe.set_progress_bar_config(disable=True)
    result = {
        "settings": settings(method, material.run),
        "threads": torch.get_num_threads(),
        **sizes(pipe.unet),
    }
    place = tests(material.work, num_tests)
    write_text(
        result_path(place, method),
        json.dumps({**result, **measure(pipe, place, num_tests)}, indent=1),
    )


def result_path(place: Path, method: Method) -> Path:
    """Return where the result of a row is kept."""
    return place / "results" / f"{re.sub(r'[^a-z0-9]+', '-', method.name.lower())}.json"


def settings(method: Method, run: Path | None) -> str:
    """Say what a result is the result of; for the fine-tuned row, of which files."""
    text = f"{method.bits} {sorted(method.options.items(), key=lambda item: item[0])} {requirements().get(method.peer)}"
    if method.name != "msfp, fine-tuned" or run is None:
        return text
    files = sorted(
        [
            *run.glob("unet/*.safetensors"),
            *run.glob("finetune/*.safetensors"),
            *run.glob("calibration/*"),
        ]
    )
    return f"{text} {hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()}"


def requirements() -> dict[str, str]:
    """Return the requirement of each peer."""
    lines = (HERE / "peers-requirements.txt").read_text().splitlines()
    return {line.split("==")[0]: line for line in lines if line and not line.startswith("#")}


def install(work: Path, peers: set[str]) -> dict[str, str]:
    """Make the peers' environment, or go on with it, and say why a peer could not be installed."""
    record, known = work / "env" / "installed.json", requirements()
    installed = set(json.loads(record.read_text())) if record.exists() else set()
    # Just the build of torch that runs here: on Linux another one would bring several gigabytes of
    # CUDA along.
    base = " ".join([f"torch=={version('torch')}", *NEEDED])
    missing = [
        wanted
        for wanted in (base, *sorted(known[peer] for peer in peers))
        if wanted not in installed
    ]
    if not peers or not missing:
        return {}
    subprocess.run([sys.executable, "-m", "venv", str(work / "env")], check=True)
    failed = {}
    for wanted in missing:
        if base in failed:
            failed[wanted] = failed[base]
        elif reason := pip_install(work / "env" / "bin" / "python", wanted):
            failed[wanted] = f"not installed: {reason}"
        else:
            installed.add(wanted)
            write_text(record, json.dumps(sorted(installed)))
    return {peer: failed[known[peer]] for peer in peers if known[peer] in failed}


def pip_install(python: Path, wanted: str) -> str:
    """Install some requirements; return why that failed, nothing if it did not."""
    print(f"installing {wanted}", file=sys.stderr, flush=True)
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        str(HERE.parent / "constraints.txt"),
    ]
    done = subprocess.run([*command, *wanted.split()], capture_output=True, text=True)
    return last_line(done.stderr) if done.returncode else ""


def last_line(text: str) -> str:
    """Return the line of a failed program's output that says why: the last that is not empty."""
    lines = [
        line.strip()
        for line in text.splitlines()
        if line.strip() and not line.startswith("[notice]")
    ]
    return lines[-1][:200] if lines else "no message"


def stored(method: Method, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the result of a row, None if there is none of its present settings."""
    path = result_path(tests(arguments.work, arguments.num_tests), method)
    result = json.loads(path.read_text()) if path.exists() else {}
    return result if result.get("settings") == settings(method, arguments.run) else None


def run_row(method: Method, arguments: argparse.Namespace) -> str:
    """Measure a row in a process of its own; return why that failed, nothing if it did not."""
    python, environment = Path(sys.executable), dict(os.environ)
    if method.peer:
        programs = (arguments.work / "env" / "bin").resolve()
        python = programs / "python"
        environment["PATH"] = f"{programs}{os.pathsep}{environment.get('PATH', '')}"
        environment["PYTHONPATH"] = str(HERE.parent / "src")
    command = [
        str(python),
        __file__,
        "--work",
        str(arguments.work),
        "--num-tests",
        str(arguments.num_tests),
    ]
    command += ["--run", str(arguments.run)] if arguments.run else []
    done = subprocess.run(
        [*command, "--method", method.name], env=environment, capture_output=True, text=True
    )
    log = result_path(tests(arguments.work, arguments.num_tests), method).with_suffix(".log")
    write_text(log, done.stdout + done.stderr)
    return last_line(done.stderr) if done.returncode else ""


def run_rows(methods: list[Method], arguments: argparse.Namespace) -> dict[str, str]:
    """Measure the rows that are missing; say why some are missing still."""
    missing = [method for method in methods if stored(method, arguments) is None]
    if missing:
        references(arguments.work, arguments.num_tests)
        _ = Material(arguments.work).recordings
    not_installed = install(arguments.work, {method.peer for method in missing} - {""})
    reasons = {}
    for method in missing:
        began = time.monotonic()
        reason = not_installed.get(method.peer) or run_row(method, arguments)
        if reason:
            reasons[method.name] = reason
        print(
            f"{method.name}: {reason or 'done'} ({time.monotonic() - began:.0f} s)",
            file=sys.stderr,
            flush=True,
        )
    return reasons


def refuse_seen(run: Path, num_tests: int) -> None:
    """Refuse a run directory that was recorded with prompts of the tests, held-out calls included.

    Raises:
        SystemExit: it was; the message says with how many.
    """
    recordings = [
        Recording(run / name) for name in ("recording", "held-out") if (run / name).exists()
    ]
    seen = {
        condition
        for recording in recordings
        for condition in recording.recipe["record"]["conditions"]
    }
    if shared := seen & set(test_prompts()[:num_tests]):
        raise SystemExit(
            f"{run} was recorded with {len(shared)} prompts of the tests; record others, or test with fewer"
        )


def cells(method: Method, result: dict[str, Any]) -> list[str]:
    """Return a line of the table."""
    share = f"{result['share']:.1%}" if result["share"] else "none"
    exact = not result["output"]
    return [
        *(
            method.name,
            method.bits,
            share,
            f"{result['bits']:.2f}" if result["share"] else "",
            f"{result['megabytes']:.2f}",
        ),
        *("0" if exact else f"{result[figure]:.6f}" for figure in ("output", "latents")),
        *("" if exact else f"{result['psnr']:.2f}", f"{result['seconds']:.3f}"),
    ]


def table(methods: list[Method], reasons: dict[str, str], arguments: argparse.Namespace) -> str:
    """Return the rows that there are, and the reasons for those that are not."""
    results = [
        (method, result) for method in methods if (result := stored(method, arguments)) is not None
    ]
    threads = sorted({result["threads"] for _, result in results})
    batch = min(BATCH, arguments.num_tests)
    head = (
        f"{arguments.num_tests} tests; a call has {2 * batch} rows, {batch} pictures with guidance; "
        f"torch {torch.__version__}, CPU, threads: {' or '.join(map(str, threads))}; "
        f"{', '.join(requirements().values())}."
    )
    rows = [
        list(COLUMNS),
        ["---"] * len(COLUMNS),
        *(cells(method, result) for method, result in results),
    ]
    shown = len(COLUMNS) if arguments.times else len(COLUMNS) - 1
    failed = [
        f"- {method.name}: {reasons[method.name]}" for method in methods if method.name in reasons
    ]
    lines = [head, "", *(f"| {' | '.join(row[:shown])} |" for row in rows)]
    return "\n".join([*lines, *(["", "Not measured:", "", *failed] if failed else [])])


def main() -> None:
    """Do one row, or all, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument(
        "--run",
        type=Path,
        help="a fine-tuned run directory of the built-in pipeline, or its export",
    )
    parser.add_argument("--num-tests", type=int, default=100, help=f"at most {len(test_prompts())}")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="just the rows whose name has it",
    )
    parser.add_argument(
        "--markdown", type=Path, help="put the table into this page, as the part named peers.py"
    )
    parser.add_argument(
        "--no-times", dest="times", action="store_false", help="leave the seconds out"
    )
    parser.add_argument(
        "--method", choices=[method.name for method in METHODS], help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.num_tests <= len(test_prompts()):
        parser.error(f"--num-tests must be 1 to {len(test_prompts())}")
    quiet_libraries()
    if arguments.method:
        (method,) = (method for method in METHODS if method.name == arguments.method)
        return work_on(method, Material(arguments.work, arguments.run), arguments.num_tests)
    if arguments.run:
        refuse_seen(arguments.run, arguments.num_tests)
    methods = [
        m for m in METHODS if not arguments.only or any(text in m.name for text in arguments.only)
    ]
    text = table(methods, run_rows(methods, arguments), arguments)
    print(text)
    if arguments.markdown:
        put(arguments.markdown, "peers.py", text)
    return None


if __name__ == "__main__":
    main()
