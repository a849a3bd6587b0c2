"""Peers: a pipeline through other quantizers that run on a CPU, and through ours.

    python benchmarks/peers.py --work DIR --run RUN [--run RUN] [--num-tests 100] [--only TEXT]
        [--markdown FILE]

Every row is measured alike, on the same prompts and noise, which no calibration uses: the errors of
`test_set.py`, the bytes that the quantized denoiser's state takes, and the median time of a call.
The peers' settings are in `peer_quantizers.py`. Ours are run directories of `msfp calibrate`: each
is a row as calibrated and, if it is fine-tuned, a row as fine-tuned, named by the options that are
not the defaults.

The script installs the peers into an environment that it makes in --work, with the torch of this
one and the other pins of constraints.txt. Each row is measured in a process of its own. A row whose
result is there is not measured again, so the script resumes, and adds only what is missing or has
changed its settings. A peer that cannot be installed or fails is listed with the reason. For steady
times leave the machine alone, or leave the times out with --no-times; OMP_NUM_THREADS in the
environment holds for all rows.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from material import UNSEEN, add_model_options, denoiser_of, part_of_page, source_of
from page import put
from peer_quantizers import METHODS, Material, Method, methods_of
from test_set import BATCH, MAX_TESTS, TestSet
from torch import Tensor, nn

from msfp_cli.checkpoint.quantizer import saved_tensors
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.files.atomic import write_text
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.recording.result import Recording

HERE = Path(__file__).resolve().parent
# What msfp itself imports in the peers' environment.
NEEDED = ("diffusers", "transformers", "accelerate", "safetensors", "pillow")
COLUMNS = (
    *("", "bits, weights/inputs", "weights quantized", "bits a quantized weight", "MB"),
    *("output error", "final latents' error", "PSNR, dB", "seconds a call"),
)
BRIEF = (0, 1, 4, 6, 7)  # of these columns


def test_set(arguments: argparse.Namespace) -> TestSet:
    """Return what all rows are tested on."""
    return TestSet(
        source=source_of(arguments),
        directory=arguments.work / f"{arguments.num_tests}-tests",
        num_tests=arguments.num_tests,
        steps=arguments.steps,
    )


def material(arguments: argparse.Namespace) -> Material:
    """Return what a method may use."""
    return Material(source=source_of(arguments), runs=tuple(arguments.run))


def all_methods(arguments: argparse.Namespace) -> list[Method]:
    """Return the rows: ours, then the peers'.

    Raises:
        SystemExit: two runs have the same options, so their rows could not be told apart.
    """
    methods = [*chain.from_iterable(map(methods_of, arguments.run)), *METHODS]
    names = [method.name for method in methods]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"more than one --run is {twice.pop()!r}; give one of them")
    return methods


def stored_tensors(value: Any) -> Iterator[Tensor]:  # noqa: ANN401 (an entry of a state dict)
    """Yield the plain tensors of a state dict's entry; some peers' tensors are made of several."""
    if not isinstance(value, Tensor):
        return
    if type(value) is nn.Parameter or not hasattr(value, "__tensor_flatten__"):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from stored_tensors(getattr(value, name))


def is_float(layer: nn.Module) -> bool:
    """Whether a layer still has a plain floating-point weight, which no quantized layer has."""
    weight = layer._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.is_floating_point()


def sizes(denoiser: nn.Module, source: ModelSource) -> dict[str, float]:
    """Return the bytes of the denoiser's state, and how much of it is quantized.

    What is not quantized counts 4 bytes a value.
    """
    _, plain = denoiser_of(load_pipeline(source, "cpu"))
    total = sum(parameter.numel() for parameter in plain.parameters())
    quantized = 0
    for name, layer in find_layers(plain).items():
        if not is_float(denoiser.get_submodule(name)):
            quantized += layer.weight.numel()
    stored = 0
    for entry in saved_tensors(denoiser).values():
        stored += sum(tensor.nbytes for tensor in stored_tensors(entry))
    bits = 8 * (stored - 4 * (total - quantized)) / quantized if quantized else 32.0
    return {"share": quantized / total, "megabytes": stored / 1e6, "bits": bits}


def work_on(method: Method, arguments: argparse.Namespace) -> None:
    """Quantize, measure, and keep the result: what the process of one row does."""
    source = source_of(arguments)
    pipe = method.quantize(load_pipeline(source, "cpu"), material(arguments), **method.options)
    pipe.set_progress_bar_config(disable=True)
    result = {
        "settings": settings(method),
        "threads": torch.get_num_threads(),
        **sizes(denoiser_of(pipe)[1], source),
        **test_set(arguments).measure(pipe),
    }
    write_text(result_path(method, arguments), json.dumps(result, indent=1))


def result_path(method: Method, arguments: argparse.Namespace) -> Path:
    """Return where the result of a row is kept."""
    words = re.sub(r"[^a-z0-9]+", "-", method.name.lower())
    digest = hashlib.sha256(method.name.encode()).hexdigest()
    return test_set(arguments).directory / "results" / f"{words[:60]}-{digest[:8]}.json"


def settings(method: Method) -> str:
    """Return what a result depends on: the settings, and what the files of a run hold."""
    options = sorted(method.options.items(), key=lambda item: item[0])
    text = f"{method.bits} {options} {requirements().get(method.peer)}"
    digest = hashlib.sha256()
    for file in method.files:
        digest.update(file.read_bytes())
    return f"{text} {digest.hexdigest()}" if method.files else text


def requirements() -> dict[str, str]:
    """Return the requirement of each peer."""
    lines = (HERE / "peers-requirements.txt").read_text().splitlines()
    return {line.split("==")[0]: line for line in lines if line and not line.startswith("#")}


def install(work: Path, peers: set[str]) -> dict[str, str]:
    """Make the peers' environment, or go on with it, and say why a peer could not be installed."""
    record = work / "env" / "installed.json"
    known = requirements()
    installed = set(json.loads(record.read_text())) if record.exists() else set()
    # The build of torch that runs here: on Linux a different one would bring gigabytes of CUDA.
    base = " ".join([f"torch=={version('torch')}", *NEEDED])
    needed = (base, *sorted(known[peer] for peer in peers))
    missing = [requirement for requirement in needed if requirement not in installed]
    if not peers or not missing:
        return {}
    subprocess.run([sys.executable, "-m", "venv", str(work / "env")], check=True)
    failed = {}
    for requirement in missing:
        if base in failed:
            failed[requirement] = failed[base]
        elif reason := pip_install(work / "env" / "bin" / "python", requirement):
            failed[requirement] = f"not installed: {reason}"
        else:
            installed.add(requirement)
            write_text(record, json.dumps(sorted(installed)))
    return {peer: failed[known[peer]] for peer in peers if known[peer] in failed}


def pip_install(python: Path, requirement: str) -> str:
    """Install requirements, separated by spaces; return why that failed, if it did."""
    print(f"installing {requirement}", file=sys.stderr, flush=True)
    constraints = HERE.parent / "constraints.txt"
    command = f"{python} -m pip install --quiet --constraint {constraints}".split()
    done = subprocess.run([*command, *requirement.split()], capture_output=True, text=True)
    return last_line(done.stderr) if done.returncode else ""


def last_line(text: str) -> str:
    """Return the line of a failed program's output that says why: the last that is not empty."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith("[notice]")]
    return next((line[:200] for line in reversed(lines) if line), "no message")


def stored(method: Method, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the result of a row, None if there is none of its present settings."""
    path = result_path(method, arguments)
    result = json.loads(path.read_text()) if path.exists() else {}
    return result if result.get("settings") == settings(method) else None


def run_row(method: Method, arguments: argparse.Namespace) -> str:
    """Measure a row in a process of its own; return why that failed, nothing if it did not."""
    python = Path(sys.executable)
    environment = dict(os.environ)
    if method.peer:
        programs = (arguments.work / "env" / "bin").resolve()
        python = programs / "python"
        environment["PATH"] = f"{programs}{os.pathsep}{environment.get('PATH', '')}"
        environment["PYTHONPATH"] = str(HERE.parent / "src")
    command = [str(python), *sys.argv, "--method", method.name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    write_text(result_path(method, arguments).with_suffix(".log"), done.stdout + done.stderr)
    return last_line(done.stderr) if done.returncode else ""


def run_rows(methods: list[Method], arguments: argparse.Namespace) -> dict[str, str]:
    """Measure the rows that are missing; say why some still are."""
    missing = [method for method in methods if stored(method, arguments) is None]
    if missing:
        test_set(arguments).prepare()
    not_installed = install(arguments.work, {method.peer for method in missing} - {""})
    reasons = {}
    for method in missing:
        began = time.monotonic()
        reason = not_installed.get(method.peer) or run_row(method, arguments)
        if reason:
            reasons[method.name] = reason
        seconds = time.monotonic() - began
        print(f"{method.name}: {reason or 'done'} ({seconds:.0f} s)", file=sys.stderr, flush=True)
    return reasons


def refuse_tested_prompts(arguments: argparse.Namespace) -> None:
    """Refuse a run directory that was recorded with prompts of the tests, held-out calls included.

    Raises:
        SystemExit: it was; the message says with how many.
    """
    recorded: set[str] = set()
    for run, name in product(arguments.run, ("recording", "held-out")):
        directory = run / name
        if directory.exists():
            recorded.update(Recording(directory).recipe["record"]["conditions"])
    if shared := recorded & set(UNSEEN[: arguments.num_tests]):
        raise SystemExit(
            f"--run was recorded with {len(shared)} prompts of the tests; "
            "record different ones, or test with fewer"
        )


def cells(method: Method, result: dict[str, Any]) -> list[str]:
    """Return a line of the table."""
    exact = not result["output"]
    quantized = bool(result["share"])
    return [
        method.name,
        method.bits,
        f"{result['share']:.1%}" if quantized else "none",
        f"{result['bits']:.2f}" if quantized else "",
        f"{result['megabytes']:.2f}",
        "0" if exact else f"{result['output']:.5f}",
        "0" if exact else f"{result['latents']:.5f} ± {result['latents_se']:.5f}",
        "" if exact else f"{result['psnr']:.2f} ± {result['psnr_se']:.2f}",
        f"{result['seconds']:.3f}",
    ]


def table(methods: list[Method], reasons: dict[str, str], arguments: argparse.Namespace) -> str:
    """Return the rows that there are, those of the Pareto front in bold, and why others are not.

    The front is that of all rows, also of those that are not shown.
    """
    results = {method: stored(method, arguments) for method in all_methods(arguments)}
    measured = {method: result for method, result in results.items() if result is not None}
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    names = {method.name for method in methods}
    for (method, result), is_best in zip(by_error(measured), on_front(measured), strict=True):
        if method.name in names:
            name, *rest = cells(method, result)
            rows.append([f"**{name}**" if is_best else name, *rest])
    threads = {result["threads"] for result in measured.values()}
    text = [head(threads, arguments), ""]
    text += [f"| {' | '.join(row[i] for i in shown(arguments))} |" for row in rows]
    if reasons:
        text += ["", "Not measured:", ""]
        text += [f"- {name}: {reason}" for name, reason in reasons.items()]
    return "\n".join(text)


def shown(arguments: argparse.Namespace) -> Sequence[int]:
    """Return which columns are shown."""
    if arguments.brief:
        return BRIEF
    return range(len(COLUMNS) if arguments.times else len(COLUMNS) - 1)


def by_error(measured: dict[Method, dict[str, Any]]) -> list[tuple[Method, dict[str, Any]]]:
    """Return the rows, the lowest error of the final latents first."""
    return sorted(measured.items(), key=lambda row: (row[1]["latents"], row[1]["megabytes"]))


def on_front(measured: dict[Method, dict[str, Any]]) -> Iterator[bool]:
    """Yield for each row of `by_error` whether it takes fewer bytes than all rows before it."""
    fewest = float("inf")
    for _, result in by_error(measured):
        yield result["megabytes"] < fewest
        fewest = min(fewest, result["megabytes"])


def head(threads: set[int], arguments: argparse.Namespace) -> str:
    """Say under which conditions the table holds."""
    batch = min(BATCH, arguments.num_tests)
    return (
        f"{arguments.num_tests} tests, ± the standard error of the mean over them; a call is for "
        f"{batch} pictures;"
        f" torch {torch.__version__}, CPU, threads: {' or '.join(map(str, sorted(threads)))};"
        f" {', '.join(requirements().values())}. In bold: no other row has both fewer bytes and a"
        " lower error of the final latents."
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where everything is kept")
    parser.add_argument(
        "--run",
        type=Path,
        action="append",
        default=[],
        help="a run directory of the pipeline, calibrated or fine-tuned as well; repeatable",
    )
    parser.add_argument("--num-tests", type=int, default=100, help=f"at most {MAX_TESTS}")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="rows whose name contains this; repeatable"
    )
    parser.add_argument(
        "--markdown", type=Path, help="put the table into this page, as the part named peers.py"
    )
    parser.add_argument("--no-times", dest="times", action="store_false", help="leave times out")
    parser.add_argument(
        "--brief", action="store_true", help="show bits, bytes, final latents and PSNR alone"
    )
    parser.add_argument("--method", help=argparse.SUPPRESS)
    add_model_options(parser)
    arguments = parser.parse_args()
    if not 1 <= arguments.num_tests <= MAX_TESTS:
        parser.error(f"--num-tests must be 1 to {MAX_TESTS}")
    return arguments


def main() -> None:
    """Do one row, or all, and print the table."""
    arguments = parse()
    quiet_libraries()
    if arguments.method:
        by_name = {method.name: method for method in all_methods(arguments)}
        work_on(by_name[arguments.method], arguments)
        return
    refuse_tested_prompts(arguments)
    only = arguments.only or [""]
    chosen = [each for each in all_methods(arguments) if any(text in each.name for text in only)]
    text = table(chosen, run_rows(chosen, arguments), arguments)
    print(text)
    if arguments.markdown:
        put(arguments.markdown, part_of_page("peers.py", arguments), text)


if __name__ == "__main__":
    main()
