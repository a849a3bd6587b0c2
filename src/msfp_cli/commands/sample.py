"""`msfp sample`: make pictures with an export."""

from pathlib import Path
from typing import Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.commands.options import (
    BatchOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OverwriteOption,
    RunOption,
    SeedOption,
)
from msfp_cli.run import DEFAULT_RUN, Run

_HELP = """Make pictures with the latest export, or with any exported directory.

Examples:

    msfp sample --prompt "a red dress"

    msfp sample --prompt "a red dress" --prompt "a blue bag" --num-images 4 --compare
"""


def sample(
    export: Annotated[
        Path | None, typer.Argument(help="Exported directory; the run's latest by default.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt or class label; repeat it for more.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with prompts, one a line.")] = None,
    num_images: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 1,
    seed: SeedOption = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the sampler; as calibrated by default.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance; as calibrated by default.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for the pictures; a new one in the run by default."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Add the full-precision pictures of the same seeds.")
    ] = False,
    batch_size: BatchOption = 8,
    kernel: Annotated[
        str,
        typer.Option(
            help="How to run the layers: auto, cpu, cuda, cuda-fp8, reference, or simulated."
        ),
    ] = "auto",
    keep_packed: Annotated[
        bool,
        typer.Option(
            "--keep-packed",
            help="Keep weights in 4 bits in memory, too: half the memory, and slower.",
        ),
    ] = False,
    run: RunOption = DEFAULT_RUN,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Make pictures."""
    from msfp_cli.pipelines.source import ModelSource

    ModelSource(model="", dtype=dtype)  # an unknown dtype is refused before torch is loaded

    import torch

    from msfp_cli.checkpoint.pipeline import MSFPPipeline, read_configs
    from msfp_cli.files import refuse_existing
    from msfp_cli.pipelines.conditions import conditioning_of, expand_conditions, read_prompts
    from msfp_cli.pipelines.loading import load_pipeline, quiet_libraries
    from msfp_cli.pipelines.source import Sampling
    from msfp_cli.sample import make_pictures, save_pictures

    asked = list(prompt or []) + list(read_prompts(prompts) if prompts else [])
    directory = export or Run(run).latest_export()
    config = next(iter(read_configs(directory).values()))
    out = out or Run(run).next_samples()
    refuse_existing(out, overwrite=overwrite)
    sampling = Sampling(
        num_inference_steps=steps, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size
    ).or_else(config.sampling)
    quiet_libraries()
    progress = console.ConsoleProgress()
    dtype_ = None if dtype is None else getattr(torch, dtype)
    quantized = MSFPPipeline.from_pretrained(
        directory, dtype=dtype_, device=device, kernel=kernel, keep_packed=keep_packed
    )
    pipe = quantized.pipe
    conditions = expand_conditions(asked, num_images, conditioning_of(pipe))
    sheets = [make_pictures(pipe, conditions, sampling, title="MSFP", progress=progress)]
    if compare:
        full = load_pipeline(
            ModelSource(**{**config.source, "dtype": dtype or config.source.get("dtype")}), device
        )
        sheets.insert(
            0, make_pictures(full, conditions, sampling, title="full precision", progress=progress)
        )
    sheet = save_pictures(sheets, conditions, sampling, out, overwrite=overwrite)
    console.result(str(sheet), {"sheet": str(sheet), "pictures": len(conditions)}, as_json=json_)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("sample", help=_HELP)(console.guarded(sample))
