"""`msfp calibrate`: record a pipeline's denoiser and choose a format for every layer."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msfp_cli.calibration.keep import parse_bits
from msfp_cli.calibration.recipe import CalibrateRecipe
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
from msfp_cli.pipelines.source import ModelSource
from msfp_cli.recording.recipe import NUM_IMAGES, NUM_IMAGES_LARGE
from msfp_cli.run import DEFAULT_RUN, Run

if TYPE_CHECKING:
    from msfp_cli.calibration.result import Calibration, LayerChoice

_HELP = """Choose a floating-point format for every layer of MODEL.

MODEL is a diffusers directory or a hub id; without it the small built-in pipeline is used. The stock pipeline runs on
some prompts, its denoiser is recorded, and every layer's format, maximum and zero point is searched.

Examples:

    msfp calibrate

    msfp calibrate stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt --keep '*attn2*:8'
"""


def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id; the built-in pipeline by default.")
    ] = None,
    run: RunOption = DEFAULT_RUN,
    weights: Annotated[str, typer.Option(help="Bits of weights, 2 to 8, or none.")] = "4",
    activations: Annotated[str, typer.Option(help="Bits of activations, 2 to 8, or none.")] = "4",
    formats: Annotated[
        str, typer.Option(help="mixed, signed, unsigned, integer, or a list such as e2m1,ue2m2.")
    ] = "mixed",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN:BITS of layers to keep at other bits (or none); repeat it, the last match wins. Unless one "
            "matches, first and last layers stay in floating point, those on timestep and text, and tables, at 8 bits."
        ),
    ] = None,
    lift: Annotated[
        float,
        typer.Option(
            help="Share of the multiply-adds that may be lifted to 8 bits, worst layers first."
        ),
    ] = 0.05,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts (or class labels), one a line.")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images",
            "--num-prompts",
            help="Pictures to record; a fifth, at most some 24, is held out to measure on. By default one for each of "
            f"--prompts, else {NUM_IMAGES}, {NUM_IMAGES_LARGE} of a large model; with fewer prompts these come again.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 20,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance; the pipeline's default.")
    ] = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 8,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="Variant of the weights, such as fp16.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    max_recording_gib: Annotated[
        float, typer.Option(help="Refuse to record more than this.")
    ] = 8.0,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Choose a format for every layer."""
    recipe = CalibrateRecipe(
        weights=parse_bits(weights, "--weights"),
        activations=parse_bits(activations, "--activations"),
        formats=formats,
        keep=tuple(keep or ()),
        lift=lift,
        seed=seed,
    )
    given = ModelSource(model="", revision=revision, variant=variant, dtype=dtype)

    from dataclasses import replace

    from msfp_cli.calibration.calibrate import calibrate_run
    from msfp_cli.pipelines.conditions import read_prompts
    from msfp_cli.pipelines.loading import quiet_libraries, resolve_model
    from msfp_cli.recording.recipe import RecordOptions
    from msfp_cli.status import next_command

    options = RecordOptions(
        prompts=None if prompts is None else read_prompts(prompts),
        num_images=num_images,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        batch_size=batch_size,
        max_recording_gib=max_recording_gib,
    )
    quiet_libraries()
    resolved, line = resolve_model(model)
    if line:
        console.note(line)
    calibration = calibrate_run(
        Run(run),
        replace(given, model=resolved),
        options,
        recipe,
        device=device,
        overwrite=overwrite,
        progress=console.ConsoleProgress(),
    )
    for component in calibration.layers:
        show(calibration, component)
    console.result(str(Run(run).calibration), summary(calibration), as_json=json_)
    console.note(f"next: {next_command(Run(run))}")


def summary(calibration: "Calibration") -> dict[str, Any]:
    """Return the calibration's main figures as JSON values."""
    return {
        "source": calibration.source.to_json(),
        "recipe": calibration.recipe.to_json(),
        "held_out_error": dict(calibration.held_out_error),
        "components": {
            component: {
                "layers": len(layers),
                "lifted": sorted(
                    name for name, layer in layers.items() if layer.reason == "lifted"
                ),
                "input_formats": dict(_count_inputs(layers.values())),
                "weight_formats": dict(_count_weights(layers.values())),
            }
            for component, layers in calibration.layers.items()
        },
    }


def _count_inputs(layers: Any) -> Counter[str]:  # noqa: ANN401 (an iterable of LayerChoice)
    return Counter(
        layer.scheme.input.format.name if layer.scheme.input else "float" for layer in layers
    )


def _count_weights(layers: Any) -> Counter[str]:  # noqa: ANN401
    return Counter(layer.scheme.weight.name if layer.scheme.weight else "float" for layer in layers)


def show(calibration: "Calibration", component: str) -> None:
    """Print which formats were chosen, the most sensitive layers, and what to expect of size and error."""
    layers = calibration.layers[component]
    inputs, weights = _count_inputs(layers.values()), _count_weights(layers.values())
    rows = [
        [name, str(inputs[name] or ""), str(weights[name] or "")]
        for name in sorted(inputs.keys() | weights.keys())
    ]
    unsigned = sum(count for name, count in inputs.items() if name.startswith("u"))
    console.table(
        f"{component}: formats of {len(layers)} layers ({unsigned} unsigned)",
        ["format", "inputs", "weights"],
        rows,
    )
    worst = sorted(layers.items(), key=lambda item: -(item[1].sensitivity or 0))[:10]
    if any(layer.sensitivity for _, layer in worst):
        console.table(
            f"{component}: most sensitive layers",
            ["layer", "alone", "formats", "why"],
            [_row(*item) for item in worst],
        )
    bits = sum(
        layer.num_weights * (layer.scheme.weight.bits if layer.scheme.weight else 16)
        for layer in layers.values()
    )
    half = sum(layer.num_weights * 16 for layer in layers.values())
    error = calibration.held_out_error[component]
    console.note(
        f"{component}: error of the output on held-out calls {error:.4f} (relative, squared)"
    )
    console.note(
        f"{component}: weights {bits / 8 / 2**20:.1f} MiB, {bits / half:.3f} of half precision"
    )
    if unused := calibration.unused.get(component):
        console.note(
            f"{component}: {len(unused)} layers never ran and stay in floating point, {unused[0]} among them"
        )


def _row(name: str, layer: "LayerChoice") -> list[str]:
    chosen = layer.scheme
    formats = f"{chosen.weight or 'float'} x {chosen.input.format if chosen.input else 'float'}"
    return [name, f"{layer.sensitivity or 0:.5f}", formats, layer.reason]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("calibrate", help=_HELP)(console.guarded(calibrate))
