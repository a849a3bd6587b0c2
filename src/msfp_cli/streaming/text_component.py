"""One text encoder of a pipeline on its way to a quantized one, read as transformers reads it."""

import os
import warnings
from pathlib import Path

from msfp_cli.checkpoint.export import tidy_
from msfp_cli.checkpoint.quantizer import IDLE_RULE, MSFPConfig
from msfp_cli.files.atomic import temporary_of
from msfp_cli.files.weight_files import stored_tensors, weight_files
from msfp_cli.pipelines.bounds import refuse_random_tensors
from msfp_cli.progress import Progress
from msfp_cli.streaming.component import ComponentJob, plan_of
from msfp_cli.streaming.parts import Parts


class TextEncoderJob(ComponentJob):
    """A text encoder that is to be quantized."""

    def encode(self, progress: Progress) -> int:
        """Quantize it unless that is done; return how many parameters it has.

        Raises:
            ModelError, CheckpointError: its files are missing or damaged.
        """
        files = weight_files(self.source, self.variant)
        Parts(self.work).begin(plan_of(files, self.recipe))
        count = sum(tensor.count for tensor in stored_tensors(files))
        with progress.task(f"Quantizing {self.source.name}", count) as advance:
            is_done = self._whole.exists()
            if not is_done:
                self._write_whole()
            advance(count)
        return 0 if is_done else count

    @property
    def _whole(self) -> Path:
        return self.work / "whole"

    def _write_whole(self) -> None:
        config = MSFPConfig(weights=self.recipe.weights, keep=self.recipe.keep, source=self.origin)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", IDLE_RULE)  # it may be of another component
            model, report = self.model_class.from_pretrained(
                self.source,
                variant=self.variant,
                dtype="auto",
                quantization_config=config,
                output_loading_info=True,
            )
        refuse_random_tensors(str(self.source), report)
        temporary = temporary_of(self._whole)
        model.save_pretrained(temporary, max_shard_size=self.recipe.shard_bytes())
        tidy_(temporary)
        os.replace(temporary, self._whole)

    def write(self, directory: Path) -> None:
        """Move the quantized text encoder to its place."""
        os.replace(self._whole, directory)
