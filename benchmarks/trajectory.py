"""Where the error of the final latents comes from, timestep by timestep.

    python benchmarks/trajectory.py --run RUN [--run RUN] [--num-tests 20] [--markdown FILE]

Each run is calibrated, and fine-tuned if it is. The stock pipeline draws the same pictures of
prompts that no calibration uses, once in full precision, once quantized, and once for each timestep
with the quantized denoiser there and full precision everywhere else. The last of these show

- the error of the denoiser's output at that timestep,
- the error of what the pipeline makes of it and gives to the sampler: guidance multiplies the
  difference of the rows with and without the prompt,
- the change of the final latents.

All errors are squared and relative to the squared values of full precision. Those of the final
latents are the mean over the pictures and, because few pictures that take another course make most
of that, the median. If the changes of the final latents did not resemble each other, their errors
would add up to that of their sum; how much larger the latter is says how alike the mistakes of
different timesteps are. A third figure is that of the quantized pipeline itself.
"""

import argparse
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from material import denoiser_of
from page import put
from test_set import TEST_SEED, TestSet
from torch import Tensor, nn

from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.export import load_calibrated
from msfp_cli.commands.console import quiet_libraries
from msfp_cli.finetuning.result import load_finetunings
from msfp_cli.layers.clock import Clock
from msfp_cli.pipelines.denoiser import Output
from msfp_cli.pipelines.loading import BUILT_IN_STEPS, Pipeline, load_pipeline
from msfp_cli.pipelines.sampling import call_pipeline
from msfp_cli.pipelines.watch import watch_scheduler, watch_times
from msfp_cli.recording.compare import relative_error
from msfp_cli.run import Run


@dataclass(frozen=True)
class Effect:
    """What quantizing one timestep does.

    Arguments:
        output: relative error of the denoiser's output there.
        passed: relative error of what the sampler is given there.
        change: of the final latents, ``(pictures, ...)``.
    """

    output: float
    passed: float
    change: Tensor


class Drawing:
    """Draws the same pictures again and again, quantized at some timesteps.

    Arguments:
        pipe: in full precision.
        quantized: its denoiser, quantized.
        clock: reads the timestep of a call.
        draw: calls the pipeline.
    """

    def __init__(
        self, pipe: Pipeline, quantized: nn.Module, clock: Clock, draw: Callable[[], object]
    ) -> None:
        self._pipe = pipe
        self._denoiser = denoiser_of(pipe)[1]
        self._quantized = quantized
        self._clock = clock
        self._draw = draw
        self._outputs: list[tuple[Tensor, Tensor]] = []

    def run(self, at: Callable[[float], bool]) -> tuple[list[float], list[Tensor], Tensor]:
        """Draw the pictures once.

        Arguments:
            at: whether a timestep is quantized.

        Returns:
            The timestep of each call, what the sampler was given in each step, the final latents.
        """
        times: list[float] = []
        passed: list[Tensor] = []
        samples: list[Tensor] = []
        self._outputs.clear()

        def keep(timestep: object, model_output: Tensor, result: Sequence[Tensor]) -> None:
            passed.append(model_output)
            samples[:] = [result[0]]

        with (
            watch_times(self._denoiser, self._clock, times.append),
            self._replaced_output(lambda: at(times[-1])),
            watch_scheduler(self._pipe.scheduler, keep),
        ):
            self._draw()
        return times, passed, samples[-1]

    @contextmanager
    def _replaced_output(self, quantize: Callable[[], bool]) -> Iterator[None]:
        """Let the quantized denoiser answer in the place of the other while the context is open."""

        def answer(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output
        ) -> Output:
            if not quantize():
                return None  # which leaves the output as it is
            other = self._quantized(*args, **kwargs)
            self._outputs.append((other[0], output[0]))
            return other

        handle = self._denoiser.register_forward_hook(answer, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def effects(self) -> tuple[dict[float, Effect], Tensor, Tensor]:
        """Quantize each timestep alone, then all.

        Returns:
            The effect of each timestep, the final latents of full precision, and those of the
            quantized pipeline.
        """
        times, passed, exact = self.run(lambda timestep: False)
        effects = {}
        for chosen in dict.fromkeys(times):
            _, own, latents = self.run(partial(operator.eq, chosen))
            pairs = zip(own, passed, strict=True)
            step = next((pair for pair in pairs if not torch.equal(*pair)), (exact, exact))
            outputs, recorded = (torch.cat(each) for each in zip(*self._outputs, strict=True))
            effects[chosen] = Effect(
                relative_error(outputs, recorded), relative_error(*step), latents - exact
            )
        *_, quantized = self.run(lambda timestep: True)
        return effects, exact, quantized


def drawing_of(run: Run, arguments: argparse.Namespace) -> Drawing:
    """Return what draws the pictures of a run."""
    calibration = Calibration.load(run.calibration)
    pipe = load_pipeline(calibration.source, "cpu")
    pipe.set_progress_bar_config(disable=True)
    tuned = load_finetunings(run, calibration)
    component, quantized = denoiser_of(load_calibrated(calibration, "cpu", tuned))
    tests = TestSet(
        source=calibration.source,
        directory=run.directory,
        num_tests=arguments.num_tests,
        steps=arguments.steps,
    )

    def draw() -> object:
        return call_pipeline(pipe, tests.conditions(pipe), tests.sampling(), output_type="latent")

    return Drawing(pipe, quantized, calibration.clock(component), draw)


def of_pictures(change: Tensor, exact: Tensor) -> Tensor:
    """Return the error of each picture, relative to the mean signal of all."""
    return change.square().flatten(1).sum(dim=1) / exact.square().sum() * len(exact)


def cells(errors: Tensor) -> str:
    """Return the mean and the median of the pictures' errors."""
    return f"{errors.mean():.5f} | {errors.quantile(0.5):.5f}"


def table(run: Run, arguments: argparse.Namespace) -> str:
    """Measure one run."""
    with torch.no_grad():
        effects, exact, quantized = drawing_of(run, arguments).effects()
    lines = [
        "| timestep quantized | output error | error that the sampler is given "
        "| final latents: mean | median |",
        "|---" * 5 + "|",
    ]
    errors = {t: of_pictures(effect.change, exact) for t, effect in effects.items()}
    for timestep, effect in effects.items():
        own = f"{timestep:g} | {effect.output:.5f} | {effect.passed:.5f}"
        lines.append(f"| {own} | {cells(errors[timestep])} |")
    summed = torch.stack([effect.change for effect in effects.values()]).sum(dim=0)
    totals = {
        "sum of these errors": torch.stack(list(errors.values())).sum(dim=0),
        "error of the sum of these changes": of_pictures(summed, exact),
        "all": of_pictures(quantized - exact, exact),
    }
    for title, of_all in totals.items():
        lines.append(f"| {title} | | | {cells(of_all)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, action="append", required=True, help="may be repeated")
    parser.add_argument("--num-tests", type=int, default=20, help="pictures")
    parser.add_argument("--markdown", type=Path, help="put the tables into this page")
    parser.add_argument("--steps", type=int, default=BUILT_IN_STEPS, help="steps of the sampler")
    arguments = parser.parse_args()
    quiet_libraries()
    head = f"{arguments.num_tests} pictures, seed {TEST_SEED}, torch {torch.__version__}, CPU."
    for directory in arguments.run:
        text = f"{directory.name}: {head}\n\n{table(Run(directory), arguments)}"
        print(text, flush=True)
        if arguments.markdown:
            put(arguments.markdown, f"trajectory.py {directory.name}", text)


if __name__ == "__main__":
    main()
