"""What a scale for each token, and rotated inputs, would gain in Linear layers.

    python benchmarks/input_scales.py --work DIR --model examples/train_flow/flow [--markdown FILE]

Each Linear layer with 4-bit inputs is replaced by one that computes the same in floating point: it
divides each token by its largest value and multiplies the output by it again, or turns blocks of
input channels by a Hadamard matrix and the weight against it, or both. Then it is calibrated as
always, without lift and with nearest rounding; the error is that of the denoiser's output on
held-out calls.
"""

import argparse
from collections.abc import Collection
from pathlib import Path

import torch
from material import add_size_options, denoiser_of, record_options, source_of
from page import put
from torch import Tensor, nn

from msfp_cli.calibration.calibrate import calibrate_
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.layers.replace import find_layers
from msfp_cli.pipelines.loading import Pipeline, load_pipeline
from msfp_cli.recording.record import record_both
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

RECIPE = CalibrateRecipe(lift=0.0, rounding="nearest")
BLOCK = 64  # channels that are turned together
WAYS = {
    "one scale (today's)": (False, False),
    "Hadamard": (True, False),
    "a scale for each token": (False, True),
    "both": (True, True),
}


def hadamard(size: int) -> Tensor:
    """Return the orthogonal Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        rows = torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)
        matrix = torch.cat(rows)
    return matrix / size**0.5


class Wrapped(nn.Module):
    """A Linear layer that computes the same on turned or scaled inputs."""

    def __init__(self, layer: nn.Linear, *, turned: bool, scaled: bool) -> None:
        super().__init__()
        self.turn = hadamard(BLOCK) if turned and layer.in_features % BLOCK == 0 else torch.eye(1)
        self.scaled = scaled
        self.bias = layer.bias
        self.layer = nn.Linear(layer.in_features, layer.out_features, bias=False)
        self.layer.weight.data = self._turned(layer.weight.data)

    def _turned(self, x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, len(self.turn))) @ self.turn).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output."""
        x = self._turned(x)
        size = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) if self.scaled else torch.ones(())
        output = self.layer(x / size) * size
        return output if self.bias is None else output + self.bias


def calibrated(pipe: Pipeline, recordings: tuple[Recording, Recording]) -> Calibration:
    """Calibrate a pipeline."""
    with torch.no_grad():
        return calibrate_(pipe, *recordings, RECIPE)


def wrap_(pipe: Pipeline, names: Collection[str], *, turned: bool, scaled: bool) -> None:
    """Replace the Linear layers of these names."""
    _, denoiser = denoiser_of(pipe)
    for name, layer in find_layers(denoiser).items():
        if name in names and isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            wrapped = Wrapped(layer, turned=turned, scaled=scaled)
            denoiser.get_submodule(parent).register_module(child, wrapped)


def main() -> None:
    """Calibrate in all ways and print the errors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where the recording is kept")
    parser.add_argument("--markdown", type=Path, help="put the table into this page")
    add_size_options(parser)
    arguments = parser.parse_args()
    quiet_libraries()
    source = source_of(arguments)
    pipe = load_pipeline(source, "cpu")
    component, _ = denoiser_of(pipe)
    recordings = record_both(pipe, Run(arguments.work), source, record_options(arguments))
    plain = calibrated(pipe, recordings)
    names = {name for name, each in plain.layers[component].items() if each.reason == "default"}
    lines = ["| inputs of Linear layers | output error |", "|---" * 2 + "|"]
    for way, (turned, scaled) in WAYS.items():
        calibration = plain
        if turned or scaled:
            pipe = load_pipeline(source, "cpu")
            wrap_(pipe, names, turned=turned, scaled=scaled)
            calibration = calibrated(pipe, recordings)
        lines.append(f"| {way} | {calibration.held_out_error[component]:.5f} |")
        print(lines[-1], flush=True)
    head = f"{arguments.num_images} pictures recorded, torch {torch.__version__}, CPU."
    text = "\n".join([head, "", *lines])
    print(text)
    if arguments.markdown:
        put(arguments.markdown, "input_scales.py", text)


if __name__ == "__main__":
    main()
