"""`msfp sample`: make pictures with an export."""

from pathlib import Path
from typing import Annotated

import typer

from msfp_cli.commands import console
from msfp_cli.options import (
    DEFAULT_RUN,
    DeviceOption,
    DtypeOption,
    JsonOption,
    Options,
    OverwriteOption,
    RunOption,
    with_options,
)
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.pipelines.sampling import Sampling

HELP = """Make pictures with the latest export, or with any exported directory.

Each is written as soon as it is made. A command that was stopped goes on when it is given again.

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
        "reference, simulated, or openvino (the whole denoiser in OpenVINO, if that is installed; "
        "openvino:GPU names its device; openvino-qk8 also rounds queries and keys of attention to "
        "8 bits)."
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

    from msfp_cli.pipelines.conditions import read_prompts
    from msfp_cli.sample import sample_run

    console.quiet_libraries()
    if export is None and (line := run.say_outdated()):
        console.note(f"note: {line}")
    if export is None and sampling.images is None and (line := run.say_lost_images()):
        console.note(f"note: {line}")
    samples = sample_run(
        run,
        [*(prompt or ()), *(read_prompts(prompts) if prompts else ())],
        sampling,
        export=export,
        num_images=num_images,
        compare=compare,
        kernel=kernel,
        keep_packed=keep_packed,
        directory=out,
        dtype=dtype,
        device=device,
        overwrite=overwrite,
        progress=console.ConsoleProgress(),
    )
    console.result(str(samples.sheet), samples.to_json(), as_json=json_)
