"""Time and peak memory of a pipeline, measured in a fresh process that does nothing else.

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
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from msfp_cli.errors import ModelError
from msfp_cli.files.documents import Json
from msfp_cli.memory import peak_bytes
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.pipelines.sampling import Sampling

_TURNS = 3


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
