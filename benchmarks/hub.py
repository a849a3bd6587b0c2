"""What a hub costs beside one member: bytes on disk and in memory, seconds to load and to call.

    python benchmarks/hub.py --run RUN --work DIR [--calls 15] [--markdown FILE]

RUN was fine-tuned with a hub. It is exported three times: as calibrated, with one member a layer;
with the hub as files hold it, the first member and what changes in the others; and with the hub in
full, a row of codes for each member, as files of layout 1 hold it. Each is loaded, and a call of
its denoiser is repeated, in turn. The last line says whether the two ways to hold a hub draw the
same pictures, bit for bit.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from material import denoiser_of
from page import put
from torch import Tensor, nn

from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated, save_pipeline
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.checkpoint.quantizer import mark_quantized_
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.finetuning.result import load_finetunings
from msfp_cli.pipelines.denoiser import replay
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.pipelines.watch import final_sample
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

ONE, FOLDED, FULL = ("one member", "a hub, folded", "a hub, in full")
LAYOUT_IN_FULL = 1
LOADS = 5
COLUMNS = (
    "| | bytes on disk | times one member's | bytes in memory | seconds to load | seconds a call |"
)


def exports(run: Run, work: Path) -> dict[str, Path]:
    """Write the three exports, and return their directories by what they are."""
    calibration = Calibration.load(run.calibration)
    tuned = load_finetunings(run, calibration)
    if not tuned:
        raise SystemExit(f"{run.directory} is not fine-tuned; run `msfp finetune` first")
    places = {ONE: work / "one", FOLDED: work / "folded", FULL: work / "full"}
    for title, place in places.items():
        states = {} if title == ONE else tuned
        pipe = load_calibrated(calibration, "cpu", states)
        if title == FULL:
            _, denoiser = denoiser_of(pipe)
            config = denoiser.hf_quantizer.quantization_config
            mark_quantized_(denoiser, replace(config, schema_version=LAYOUT_IN_FULL))
        save_pipeline(pipe, place)
    return places


def median_seconds(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median time of each action; they take turns, and the first round warms up."""
    seconds: dict[str, list[float]] = {title: [] for title in actions}
    for _ in range(rounds + 1):
        for title, action in actions.items():
            began = time.perf_counter()
            action()
            seconds[title].append(time.perf_counter() - began)
    return {title: statistics.median(own[1:]) for title, own in seconds.items()}


def bytes_on_disk(pipe: Pipeline, directory: Path) -> int:
    """Return what the files of a denoiser's weights take."""
    component, _ = denoiser_of(pipe)
    return sum(file.stat().st_size for file in (directory / component).glob("*.safetensors"))


def tensors_of(value: Any) -> Iterator[Tensor]:  # noqa: ANN401 (whatever a kernel keeps)
    """Yield the tensors in a value, which a kernel keeps in lists, mappings and objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(tensors_of, value.values()))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(tensors_of, value))
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from tensors_of(vars(value))


def bytes_in_memory(pipe: Pipeline) -> int:
    """Return what a denoiser's tensors take, with those that its kernels keep."""
    tensors = {}
    for module in denoiser_of(pipe)[1].modules():
        kept = (module._parameters, module._buffers, getattr(module, "kernel", None))
        for tensor in tensors_of(kept):
            # The library that runs products in integers keeps weights in a layout of its own.
            place = id(tensor) if tensor.is_mkldnn else tensor.data_ptr()
            tensors[place] = tensor.numel() * tensor.element_size()
    return sum(tensors.values())


def same_pictures(pipes: dict[str, Pipeline], record: RecordRecipe) -> bool:
    """Whether both ways to hold a hub end at the same final latents."""
    conditions = record.conditions[: record.batch_size]
    samples = [final_sample(pipes[title], conditions, record) for title in (FOLDED, FULL)]
    return torch.equal(*samples)


def table(run: Run, arguments: argparse.Namespace) -> str:
    """Measure the three exports, and return the table."""
    places = exports(run, arguments.work)
    loads = {title: partial(MSFPPipeline.from_pretrained, at) for title, at in places.items()}
    loading = median_seconds(loads, LOADS)
    pipes = {title: load() for title, load in loads.items()}
    recording = Recording(run.held_out)
    component, _ = denoiser_of(pipes[ONE])
    call = next(iter(recording.calls(component)))
    calls = {title: partial(replay, denoiser_of(pipe)[1], call) for title, pipe in pipes.items()}
    calling = median_seconds(calls, arguments.calls)
    sizes = {title: bytes_on_disk(pipe, places[title]) for title, pipe in pipes.items()}
    lines = [COLUMNS, "|---" * 6 + "|"]
    for title, pipe in pipes.items():
        share = sizes[title] / sizes[ONE]
        lines.append(
            f"| {title} | {sizes[title]:,} | {share:.2f} | {bytes_in_memory(pipe):,} "
            f"| {loading[title]:.2f} | {calling[title]:.3f} |"
        )
    record = RecordRecipe.from_json(recording.recipe["record"])
    return "\n".join(
        (
            *lines,
            "",
            f"A call of {len(call.output)} rows, kernel `auto`; torch {torch.__version__}, CPU, "
            f"threads: {torch.get_num_threads()}.",
            "",
            f"same pictures from both ways to hold a hub: {same_pictures(pipes, record)}",
        )
    )


def main() -> None:
    """Export, load, call, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a fine-tuned run directory")
    parser.add_argument("--work", type=Path, required=True, help="where the exports are kept")
    parser.add_argument("--calls", type=int, default=15, help="of each denoiser")
    parser.add_argument("--markdown", type=Path, help="put the table into this page")
    arguments = parser.parse_args()
    quiet_libraries()
    text = table(Run(arguments.run), arguments)
    print(text)
    if arguments.markdown:
        put(arguments.markdown, "hub.py", text)


if __name__ == "__main__":
    main()
