"""`msfp sample`: make pictures with an export."""

from pathlib import Path
from typing import Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.commands.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    Options,
    OverwriteOption,
    RunOption,
    with_options,
)
from msfp_cli.pipelines.source import ModelSource, Sampling
from msfp_cli.run import DEFAULT_RUN, Run

_HELP = """Make pictures with the latest export, or with any exported directory.

Examples:

    msfp sample --prompt "a red dress"

    msfp sample --prompt "a red dress" --prompt "a blue bag" --num-images 4 --compare
"""


ExportArgument = Annotated[
    Path | None, typer.Argument(help="Exported directory. Default: the run's latest export.")
]
PromptOption = Annotated[list[str] | None, typer.Option(help="Prompt or class label; repeatable.")]
PromptsOption = Annotated[
    Path | None, typer.Option(help="File with more prompts or class labels, one a line.")
]
NumImagesOption = Annotated[int, typer.Option(help="Pictures of each prompt.")]
CompareOption = Annotated[
    bool,
    typer.Option("--compare", help="Add the full-precision model's pictures of the same seeds."),
]
KernelOption = Annotated[
    str,
    typer.Option(
        help="How layers are computed: auto (what suits the device), cpu, cuda, cuda-fp8, "
        "reference, or simulated."
    ),
]
KeepPackedOption = Annotated[
    bool,
    typer.Option(
        "--keep-packed",
        help="Keep 4-bit weights packed in memory, which halves their size and is slower.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Directory for the pictures. Default: a new one in the run directory."),
]


@with_options(Sampling)
def sample(
    options: Options,
    export: ExportArgument = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    num_images: NumImagesOption = 1,
    compare: CompareOption = False,
    kernel: KernelOption = "auto",
    keep_packed: KeepPackedOption = False,
    out: OutOption = None,
    run: RunOption = DEFAULT_RUN,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Make pictures."""
    ModelSource(model="", dtype=dtype)  # what is wrong is refused before torch is loaded
    sampling = options.recipe(Sampling)

    import torch

    from msfp_cli.checkpoint.pipeline import MSFPPipeline, read_configs
    from msfp_cli.files import refuse_existing
    from msfp_cli.pipelines.conditions import conditioning_of, expand_conditions, read_prompts
    from msfp_cli.pipelines.loading import load_pipeline, quiet_libraries
    from msfp_cli.sample import make_pictures, save_pictures

    asked = list(prompt or []) + list(read_prompts(prompts) if prompts else [])
    directory = export or Run(run).latest_export()
    config = next(iter(read_configs(directory).values()))
    out = out or Run(run).next_samples()
    refuse_existing(out, overwrite=overwrite)
    sampling = sampling.or_else(config.sampling)
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
