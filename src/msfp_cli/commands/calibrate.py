"""`msfp calibrate`: record a pipeline's denoiser and choose a format for every layer."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.commands import console
from msfp_cli.commands.launch import ProcessesOption, is_main, progress, share_out
from msfp_cli.options import (
    DEFAULT_RUN,
    DeviceOption,
    JsonOption,
    MaxMemoryOption,
    Options,
    OverwriteOption,
    RunOption,
    read_memory,
    with_options,
)
from msfp_cli.pipelines.loading import ModelSource
from msfp_cli.recording.recipe import RecordOptions

if TYPE_CHECKING:
    from msfp_cli.calibration.calibrate import Calibration, LayerChoice

HELP = """Choose a floating-point format for every layer of MODEL.

The stock pipeline draws pictures of some prompts, and the calls of its denoiser are recorded. Then
the format, maximum and zero point of every layer are searched, and the error of the quantized
denoiser is measured on calls that were held out.

Examples:

    msfp calibrate

    msfp calibrate stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt

    msfp calibrate --weights 4 --activations 6 --keep '*attn2*:8'

    msfp calibrate black-forest-labs/FLUX.1-schnell --max-memory 16GiB

    accelerate launch -m msfp_cli calibrate stable-diffusion-v1-5/stable-diffusion-v1-5
"""
# Why layers with a role have bits of their own.
_WHY_KEPT = {
    "first": "the first to see the sample",
    "last": "the last before the output",
    "conditions": "they see only time and conditions",
}
_FEW = 4  # names that are written out
ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Diffusers directory or hub id. Default: the small built-in pipeline."),
]


@with_options(CalibrateRecipe, RecordOptions, ModelSource)
def calibrate(
    options: Options,
    model: ModelArgument = None,
    run: RunOption = DEFAULT_RUN,
    device: DeviceOption = None,
    max_memory: MaxMemoryOption = None,
    num_processes: ProcessesOption = 1,
    overwrite: OverwriteOption = False,
    json_: JsonOption = False,
) -> None:
    """Choose a format for every layer."""
    recipe = options.recipe(CalibrateRecipe)
    recording = options.recipe(RecordOptions)
    source = options.recipe(ModelSource, model=model or "")
    memory = read_memory(max_memory)
    share_out(num_processes, run.lock(create=True))

    from msfp_cli.calibration.calibrate import calibrate_run
    from msfp_cli.pipelines.loading import resolve_model
    from msfp_cli.status import next_command, wider_inputs

    console.quiet_libraries()
    resolved, line = resolve_model(model)
    if line and is_main():
        console.note(line)
    calibration = calibrate_run(
        run,
        replace(source, model=resolved),
        recording,
        recipe,
        device=device,
        max_memory=memory,
        overwrite=overwrite,
        progress=progress(),
    )
    if not is_main():
        return
    for component in calibration.layers:
        show(calibration, component)
    if line := wider_inputs(calibration, device):
        console.note(line)
    console.result(str(run.calibration), summary(calibration), as_json=json_)
    console.note(f"next: {next_command(run)}")


def summary(calibration: "Calibration") -> dict[str, Any]:
    """Return the calibration's main figures as JSON values."""
    return {
        "source": calibration.source.to_json(),
        "recipe": calibration.recipe.to_json(),
        "held_out_error": dict(calibration.held_out_error),
        "input_bits": {name: calibration.input_bits(name) for name in calibration.layers},
        "floating_point": {name: calibration.float_shares(name) for name in calibration.layers},
        "components": {
            component: _summary_of(layers) for component, layers in calibration.layers.items()
        },
    }


def _summary_of(layers: Mapping[str, "LayerChoice"]) -> dict[str, Any]:
    return {
        "layers": len(layers),
        "roles": _names_by_role(layers),
        "lifted": sorted(name for name, layer in layers.items() if layer.reason == "lifted"),
        "input_formats": dict(_count_inputs(layers.values())),
        "weight_formats": dict(_count_weights(layers.values())),
        "rotated": sorted(name for name, each in layers.items() if each.scheme.transform.rotation),
        "token_scales": sorted(
            name for name, each in layers.items() if each.scheme.transform.token_scales
        ),
        "nearest_rounding": sorted(name for name, layer in layers.items() if _kept_nearest(layer)),
    }


def _names_by_role(layers: Mapping[str, "LayerChoice"]) -> dict[str, list[str]]:
    """Return the layers of each role."""
    return {
        role: [name for name, layer in layers.items() if layer.role == role] for role in _WHY_KEPT
    }


def _kept(layers: Mapping[str, "LayerChoice"]) -> str:
    """Say which layers have a role, what their bits are, and why."""
    names: dict[tuple[str, str], list[str]] = {}
    for role, own in _names_by_role(layers).items():
        for name in own:
            names.setdefault((role, _width(layers[name])), []).append(name)
    return "; ".join(
        f"{_few(own)} {width} ({_WHY_KEPT[role]})" for (role, width), own in names.items()
    )


def _width(layer: "LayerChoice") -> str:
    grid = layer.scheme.input
    formats = [layer.scheme.weight, grid.format if grid else None]
    bits = [str(each.bits) for each in formats if each is not None]
    return f"with {'/'.join(dict.fromkeys(bits))} bits" if bits else "in floating point"


def _few(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:_FEW])
    return f"{shown} and {len(names) - _FEW} more" if len(names) > _FEW else shown


def _kept_nearest(layer: "LayerChoice") -> bool:
    """Whether compensation was tried on a layer and did not help."""
    return layer.compensation is not None and layer.compensation.damping is None


def _count_inputs(layers: Iterable["LayerChoice"]) -> Counter[str]:
    return Counter(
        layer.scheme.input.format.name if layer.scheme.input else "float" for layer in layers
    )


def _count_weights(layers: Iterable["LayerChoice"]) -> Counter[str]:
    return Counter(layer.scheme.weight.name if layer.scheme.weight else "float" for layer in layers)


def show(calibration: "Calibration", component: str) -> None:
    """Print the chosen formats, the most sensitive layers, the size and the error."""
    layers = calibration.layers[component]
    inputs = _count_inputs(layers.values())
    weights = _count_weights(layers.values())
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
    bits += 4 * sum(each.numel() for each in calibration.multipliers.get(component, {}).values())
    half = sum(layer.num_weights * 16 for layer in layers.values())
    error = calibration.held_out_error[component]
    console.note(
        f"{component}: error of the output on held-out calls {error:.4f} (relative, squared)"
    )
    console.note(
        f"{component}: weights {bits / 8 / 2**20:.1f} MiB, {bits / half:.3f} of half precision"
    )
    if line := calibration.floats_in_words(component):
        console.note(f"{component}: {line}")
    bits_of_inputs = calibration.input_bits(component)
    console.note(f"{component}: inputs have {bits_of_inputs:.2f} bits on average, by multiply-adds")
    if line := calibration.transforms_in_words(component):
        console.note(f"{component}: {line}")
    if line := _kept(layers):
        console.note(f"{component}: by their place in the network: {line}")
    if line := _lifted_inputs(calibration, component):
        console.note(f"{component}: {line}")
    if line := _rounding(layers):
        console.note(f"{component}: {line}")
    if unused := calibration.unused.get(component):
        console.note(
            f"{component}: {len(unused)} layers never ran and stay in floating point, "
            f"{unused[0]} among them"
        )


def _lifted_inputs(calibration: "Calibration", component: str) -> str:
    """Say at which timesteps inputs are lifted, and what that takes away; empty if nowhere."""
    lift = calibration.input_lifts.get(component)
    if lift is None:
        return ""
    pairs = zip(lift.timesteps, lift.lifted, strict=True)
    chosen = [f"{timestep:g}" for timestep, lifted in pairs if lifted]
    gain = sum(gain for gain, lifted in zip(lift.gains, lift.lifted, strict=True) if lifted)
    return (
        f"inputs have 8 bits at {len(chosen)} of {len(lift.timesteps)} timesteps "
        f"({', '.join(chosen)}), with {gain:.0%} of what 8 bits at all of them would gain"
    )


def _rounding(layers: Mapping[str, "LayerChoice"]) -> str:
    """Say how many weights are rounded for the output of their layers, and which are not."""
    tried = {name: layer.compensation for name, layer in layers.items() if layer.compensation}
    nearest = [name for name in tried if _kept_nearest(layers[name])]
    if not tried:
        return ""
    line = f"{len(tried) - len(nearest)} of {len(tried)} weights are rounded for the layer's output"
    return f"{line}; to the nearest: {', '.join(nearest)}" if nearest else line


def _row(name: str, layer: "LayerChoice") -> list[str]:
    chosen = layer.scheme
    formats = f"{chosen.weight or 'float'} x {chosen.input.format if chosen.input else 'float'}"
    return [name, f"{layer.sensitivity or 0:.5f}", formats, layer.reason]
