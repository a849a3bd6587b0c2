"""Time and peak memory of a pipeline, measured in a fresh process that does nothing else.

`time_calls` compares single calls of the denoisers instead, in this process.

python -m msfp_cli.evaluation.cost '{"source": {...}, "sampling": {...}, "conditions": [...],
"device": "cpu", "kernel": null}'
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from msfp_cli.errors import ModelError
from msfp_cli.files.documents import Json
from msfp_cli.memory import peak_bytes
from msfp_cli.pipelines.denoiser import DenoiserCall, replay
from msfp_cli.pipelines.loading import ModelSource, Pipeline
from msfp_cli.pipelines.sampling import Sampling
from msfp_cli.progress import SILENT, Advance, Progress

_TURNS = 3
_SLOWER = 1.02  # what is within two per cent counts as equal


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and memory that a pipeline takes.

    Arguments:
        load_seconds: from the start of loading to a pipeline that can be called.
        seconds_per_picture: median of three calls, after one that does not count.
        peak_memory_bytes: of the process (on a CPU), or of what torch held on the accelerator.
    """

    load_seconds: float
    seconds_per_picture: float
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class CallTime:
    """Seconds that one call of a denoiser takes: the median of three, after one that warms up."""

    quantized: float
    full_precision: float


def time_calls(
    source: ModelSource,
    export: str,
    calls: Mapping[str, DenoiserCall],
    device: str | None,
    progress: Progress = SILENT,
) -> dict[str, CallTime]:
    """Repeat a call of each denoiser, as exported and then in full precision.

    Arguments:
        source: the pipeline in full precision.
        export: a directory.
        calls: by component.
    """
    from msfp_cli.checkpoint.pipeline import load_export
    from msfp_cli.pipelines.loading import load_pipeline

    with progress.task("Timing calls", 2 * len(calls) * (1 + _TURNS)) as step:
        exported = ModelSource(model=export)
        quantized = _seconds_of(load_export(exported, device, "auto"), calls, step)
        full = _seconds_of(load_pipeline(source, device), calls, step)
    return {name: CallTime(quantized=quantized[name], full_precision=full[name]) for name in calls}


def _seconds_of(
    pipe: Pipeline, calls: Mapping[str, DenoiserCall], advance: Advance
) -> dict[str, float]:
    """Return the seconds of each call; the result is waited for, on an accelerator too."""
    medians = {}
    for component, call in calls.items():
        seconds = []
        for _ in range(1 + _TURNS):
            start = time.perf_counter()
            replay(getattr(pipe, component), call).cpu()
            seconds.append(time.perf_counter() - start)
            advance(1)
        medians[component] = statistics.median(seconds[1:])
    return medians


def slowness(
    quantized: float, full_precision: float, what: str, kernel: str = "auto"
) -> str | None:
    """Say that what is quantized takes longer than full precision here; nothing if it does not.

    Arguments:
        quantized, full_precision: seconds.
        what: that takes this long.
        kernel: that was asked for.
    """
    ratio = quantized / full_precision
    if ratio <= _SLOWER:
        return None
    line = f"{what} takes {ratio:.2f} times as long as in full precision on this machine"
    return line if kernel != "auto" else f"{line}; on a CPU, --kernel openvino may be faster"


def measure_cost(
    source: ModelSource,
    conditions: Sequence[str | None],
    sampling: Sampling,
    *,
    device: str | None = None,
    kernel: str | None = None,
) -> Cost:
    """Call a pipeline four times in a fresh process, and return the time and memory it took.

    Arguments:
        kernel: of an export; None for a stock pipeline.

    Raises:
        ModelError: the process failed; the message is its last line.
    """
    job = {
        "source": source.to_json(),
        "sampling": Sampling(**sampling.settings()).to_json(),
        "conditions": list(conditions),
        "device": device,
        "kernel": kernel,
    }
    command = [sys.executable, "-m", "msfp_cli.evaluation.cost", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ModelError(f"cannot measure time and memory of {source.model}: {last}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def machine(device: str) -> dict[str, str]:
    """Say what this is measured on."""
    import diffusers
    import torch

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def _measure(job: Json) -> Cost:
    """Measure in this process.

    Arguments:
        job: source, sampling, conditions, device and kernel, as `measure_cost` writes them.
    """
    import torch

    from msfp_cli.checkpoint.pipeline import load_export
    from msfp_cli.pipelines.loading import load_pipeline
    from msfp_cli.pipelines.sampling import call_pipeline

    start = time.perf_counter()
    source = ModelSource.from_json(job["source"])
    if job["kernel"] is None:
        pipe = load_pipeline(source, job["device"])
    else:
        pipe = load_export(source, job["device"], job["kernel"])
    load_seconds = time.perf_counter() - start
    sampling = Sampling.from_json(job["sampling"])
    seconds = []
    for _ in range(1 + _TURNS):
        start = time.perf_counter()
        call_pipeline(pipe, job["conditions"], sampling)
        seconds.append(time.perf_counter() - start)
    on_gpu = torch.cuda.is_available() and pipe.device.type == "cuda"
    return Cost(
        load_seconds=load_seconds,
        seconds_per_picture=statistics.median(seconds[1:]) / len(job["conditions"]),
        peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else peak_bytes(),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(json.loads(sys.argv[1])))))
