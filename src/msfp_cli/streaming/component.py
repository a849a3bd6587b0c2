"""One denoiser of a pipeline on its way from a directory in full precision to a quantized one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights

from msfp_cli.checkpoint.export import tidy_
from msfp_cli.checkpoint.quantizer import DiffusersModel, mark_quantized_, weight_only_config
from msfp_cli.checkpoint.weight_only import WeightEncoder
from msfp_cli.errors import UsageError
from msfp_cli.files.weight_files import stored_tensors, weight_files, with_present_names
from msfp_cli.progress import Progress
from msfp_cli.streaming.parts import Parts
from msfp_cli.streaming.recipe import QuantizeRecipe


@dataclass(frozen=True, kw_only=True)
class ComponentSize:
    """What a quantized component takes on disk: bytes before and after."""

    before: int
    after: int


def plan_of(files: Sequence[Path], recipe: QuantizeRecipe) -> dict[str, Any]:
    """Return what unfinished work depends on: files in full precision, the recipe, the version."""
    # Copies in archives and images of containers often have the same time, so the place counts.
    stats = [(str(path.resolve()), path.stat()) for path in files]
    return {
        "files": [[place, stat.st_size, stat.st_mtime_ns] for place, stat in stats],
        "recipe": asdict(recipe),
        "format": weight_only_config({}).to_dict(),
    }


@dataclass(frozen=True, kw_only=True)
class ComponentJob:
    """A component that is to be quantized.

    Arguments:
        model_class: of diffusers or transformers.
        source: its directory.
        variant: of its files; None for those without one.
        work: a directory for what is finished.
        recipe: its bits, and the rules.
        origin: what the pipeline was loaded from, as JSON.
    """

    model_class: Any
    source: Path
    variant: str | None
    work: Path
    recipe: QuantizeRecipe
    origin: dict[str, Any]

    def size(self, directory: Path) -> ComponentSize:
        """Return what it takes in the source, and in a directory that it was written to."""
        files = weight_files(self.source, self.variant)
        return ComponentSize(
            before=sum(path.stat().st_size for path in files),
            after=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        )


class DenoiserJob(ComponentJob):
    """A denoiser that is to be quantized."""

    def encode(self, progress: Progress) -> int:
        """Make the parts that are missing; return how many parameters they hold.

        Raises:
            UsageError: it is quantized already.
            ModelError, CheckpointError: its files are missing or damaged.
        """
        files = weight_files(self.source, self.variant)
        name = self.source.name
        model = self._empty()
        encoder = WeightEncoder(model, self.recipe.rules())
        for rule in encoder.idle_rules():
            progress.log(f"--keep {rule!r} matches no layer of {name}")
        parts = Parts(self.work)
        parts.begin(plan_of(files, self.recipe))
        tensors = with_present_names(model, stored_tensors(files))
        return parts.encode(tensors, encoder, f"Quantizing {name}", progress)

    def _empty(self) -> DiffusersModel:
        """Return the denoiser without values."""
        config = self.model_class.load_config(self.source)
        if config.get("quantization_config"):
            raise UsageError(
                f"{self.source.name} is quantized already; give the model in full precision"
            )
        with init_empty_weights(include_buffers=True):
            return self.model_class.from_config(config)

    def write(self, directory: Path) -> None:
        """Write the quantized denoiser, whose parts are all there."""
        model = self._empty()
        mark_quantized_(model, weight_only_config(Parts(self.work).fill_(model), self.origin))
        model.save_pretrained(directory, max_shard_size=self.recipe.shard_bytes())
        tidy_(directory)
