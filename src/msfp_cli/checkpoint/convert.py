"""Store a converted denoiser beside a checkpoint, so that an engine loads it at once."""

from pathlib import Path

from msfp_cli.checkpoint.engine import FOLDER, attach_engine_
from msfp_cli.checkpoint.pipeline import read_denoisers, times_of
from msfp_cli.pipelines.conditions import conditions_for
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.pipelines.sampling import Sampling, call_pipeline
from msfp_cli.progress import SILENT, Progress


def convert_export(directory: Path, engine: str, *, progress: Progress = SILENT) -> None:
    """Draw a picture of one step with an engine, and keep what it converts in the export.

    The stock pipeline calls its denoiser as it will when it is used, so the conversion fits.

    Arguments:
        engine: a kernel's name, such as ``openvino``.

    Raises:
        UsageError: the engine is not installed, or cannot take what the pipeline passes.
    """
    source = ModelSource(model=str(directory))
    denoisers = read_denoisers(directory)
    pipe = load_pipeline(source, "cpu")
    times = times_of(denoisers)
    attach_engine_(pipe, times, engine, directory, progress, place=directory / FOLDER)
    first = next(iter(denoisers.values()))
    sampling = Sampling(num_inference_steps=1).or_else(first.sampling)
    call_pipeline(pipe, conditions_for(pipe, source, None, 1), sampling)
