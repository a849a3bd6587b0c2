"""Pictures to test a quantized pipeline on, which no calibration uses, and its error on them.

Each error compares with full precision, from equal noise: that of the denoiser's output along the
full-precision trajectories, of the final latents, and of the pictures.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from material import UNSEEN, denoiser_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from msfp_cli.evaluation.features.extractors import load_extractor
from msfp_cli.evaluation.metrics.distances import frechet_distance, too_few
from msfp_cli.files.atomic import replace_file
from msfp_cli.pipelines.conditions import conditioning_of
from msfp_cli.pipelines.denoiser import replay
from msfp_cli.pipelines.loading import BUILT_IN_GUIDANCE, ModelSource, Pipeline, load_pipeline
from msfp_cli.pipelines.sampling import Sampling, call_pipeline
from msfp_cli.pipelines.watch import watch_samples
from msfp_cli.recording.compare import OutputError
from msfp_cli.recording.recipe import RecordRecipe
from msfp_cli.recording.record import record_calls
from msfp_cli.recording.result import Recording

TEST_SEED = 9_000_000
MAX_TESTS = 200
BATCH = 20


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """What to test on.

    Arguments:
        source: the full-precision pipeline.
        directory: where its trajectories, final latents and pictures are kept.
        num_tests: pictures.
        steps: of the sampler.
        extractor: of the features that distances of sets of pictures are measured by, if any; it
            takes twice as many tests as it has features.
    """

    source: ModelSource
    directory: Path
    num_tests: int
    steps: int
    extractor: str = ""

    def conditions(self, pipe: Pipeline) -> tuple[str | None, ...]:
        """Return a prompt per picture, reused with new noise if there are too few; or nothing."""
        if conditioning_of(pipe) == "none":
            return (None,) * self.num_tests
        return tuple(UNSEEN[i % len(UNSEEN)] for i in range(self.num_tests))

    def sampling(self) -> Sampling:
        """Return how each picture is drawn."""
        return Sampling(
            num_inference_steps=self.steps,
            guidance_scale=BUILT_IN_GUIDANCE,
            seed=TEST_SEED,
            batch_size=BATCH,
        )

    @property
    def _full_precision(self) -> Path:
        return self.directory / "full-precision.safetensors"

    def prepare(self) -> None:
        """Record full precision's trajectories, and keep its latents and pictures, once."""
        pipe = load_pipeline(self.source, "cpu")
        recipe = RecordRecipe.of(self.conditions(pipe), self.sampling())
        record_calls(pipe, self.source, recipe, self.directory / "trajectories")
        if not self._full_precision.exists():
            latents, pictures = self.sample(pipe)
            with replace_file(self._full_precision) as temporary:
                save_file({"latents": latents, "pictures": pictures}, temporary)
        if self.extractor:
            pictures = load_file(self._full_precision)["pictures"]
            self._frechet(pictures, pictures)  # refuses too few before anything is trained

    @torch.no_grad()
    def sample(self, pipe: Pipeline) -> tuple[Tensor, Tensor]:
        """Return the final latents and the pictures (0..1) of a pipeline.

        The latents of a pipeline without an autoencoder are its pictures, from -1 to 1.
        """
        latents = []
        pictures = []
        for first in range(0, self.num_tests, BATCH):
            conditions = self.conditions(pipe)[first : first + BATCH]
            with watch_samples(pipe) as samples:
                call_pipeline(pipe, conditions, self.sampling(), first=first, output_type="latent")
            latents.append(samples[-1])
            pictures.append(decoded(pipe, samples[-1]))
        return torch.cat(latents).contiguous(), torch.cat(pictures).contiguous()

    def measure(self, pipe: Pipeline) -> dict[str, float]:
        """Return a quantized pipeline's errors, and the median seconds of a denoiser call.

        ``latents_se`` and ``psnr_se`` are the standard errors of these means over the pictures.
        ``frechet`` is the Fréchet distance of the pictures from full precision's, if there is an
        extractor.
        """
        latents, pictures = self.sample(pipe)
        full = load_file(self._full_precision)
        picture_error = (pictures - full["pictures"]).square().flatten(1).mean(dim=1)
        signal = full["latents"].square().sum() / self.num_tests
        latent_error = (latents - full["latents"]).square().flatten(1).sum(dim=1) / signal
        psnr = -10 * picture_error.clamp_min(1e-10).log10()
        output = OutputError()
        seconds = []
        component, denoiser = denoiser_of(pipe)
        for call in Recording(self.directory / "trajectories").calls(component):
            began = time.perf_counter()
            result = replay(denoiser, call)
            seconds.append(time.perf_counter() - began)
            output.add(call.timestep, result, call.output)
        return {
            "output": output.relative(),
            "latents": float(latent_error.mean()),
            "latents_se": standard_error(latent_error),
            "psnr": float(psnr.mean()),
            "psnr_se": standard_error(psnr),
            "seconds": statistics.median(seconds),
            **({"frechet": self._frechet(pictures, full["pictures"])} if self.extractor else {}),
        }

    def _frechet(self, pictures: Tensor, reference: Tensor) -> float:
        extractor = load_extractor(self.extractor)
        both = [extractor.features((each * 255).round().byte()) for each in (pictures, reference)]
        if too_few(len(pictures), both[0].shape[1]):
            raise SystemExit(f"{self.extractor} needs --num-tests {2 * both[0].shape[1]}")
        return frechet_distance(*both)


def decoded(pipe: Pipeline, latents: Tensor) -> Tensor:
    """Return pictures (0..1) of final latents, before they are rounded to 8 bits."""
    if not hasattr(pipe, "vae"):
        return (latents / 2 + 0.5).clamp(0, 1)
    pictures = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(pictures, output_type="pt")


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of values, one for each picture; 0 for one picture."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
