"""Pictures of one model on disk, with their final latents: one safetensors file per batch.

Layout of a gallery directory::

    gallery.json            the recipe, which model drew it, digests of the files beside it and of
                            the pictures that it was given
    00000.safetensors ...   ``latents``, ``pictures`` (uint8, NCHW), and in the header a digest, and
                            whether the pictures are drawings of sound or embeddings

Picture i is drawn with ``seed + i`` whatever the batch, so galleries of two models pair up. A batch
is there whole or not at all, and an interrupted gallery goes on with the first that is missing.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msfp_cli.errors import MsfpError, RunError
from msfp_cli.evaluation.identity import sealed_files
from msfp_cli.files.documents import (
    damaged,
    digest,
    open_tensors,
    read_json,
    to_text,
    write_json,
    write_tensors,
)
from msfp_cli.pipelines.loading import Pipeline
from msfp_cli.pipelines.sampling import draw_stills
from msfp_cli.pipelines.watch import watch_samples
from msfp_cli.processes import ALONE, Processes
from msfp_cli.recording.recipe import RecordRecipe

_MANIFEST = "gallery.json"
_REDO = "delete it and run the same `msfp evaluate` again"
# Of a batch: the keys under which it says what it is, and that its pictures are drawings.
_HEADER = "gallery"
_DRAWINGS = "drawings"


@dataclass(frozen=True)
class Gallery:
    """A gallery directory, complete or not.

    Arguments:
        directory: where it is.
        recipe: prompts, steps, guidance, seed, pictures per batch.
    """

    directory: Path
    recipe: RecordRecipe

    @classmethod
    def create(
        cls,
        directory: Path,
        recipe: RecordRecipe,
        model: dict[str, Any],
        files: str | None = None,
        images: str | None = None,
    ) -> "Gallery":
        """Begin a gallery, or open the one that was begun with the same recipe and model.

        Galleries of earlier versions have none of the two digests.

        Arguments:
            model: what tells the model from others, as JSON values.
            files: a digest of its files beside the denoisers, None if it is not known.
            images: a digest of the pictures that it is given, None if there are none.

        Raises:
            RunError: the directory holds pictures of another recipe or model, or those of the
                folder of ``images`` have changed.
        """
        digests = {"files": files, "images": images}
        contents = {"model": model, "recipe": recipe.to_json(), **digests}
        manifest = directory / _MANIFEST
        if not manifest.exists():
            write_json(manifest, contents)
        redo = "use --overwrite to draw the pictures again"
        stored = read_json(manifest, dict, redo=redo)
        known = {key: stored.get(key) or own for key, own in digests.items()}
        if {**stored, **known, "images": images} != contents:
            raise RunError(
                f"{directory} holds pictures of other settings or of another model; use --overwrite"
            )
        if known["images"] != images:
            raise RunError(
                f"the pictures of {recipe.images} have changed since {directory} was begun; "
                "use --overwrite"
            )
        return cls(directory, recipe)

    def is_of(self, export: Path) -> bool:
        """Whether an export drew it with the files that it has now, as far as that is known."""
        redo = "run the same `msfp evaluate` again, with --overwrite"
        files = read_json(self.directory / _MANIFEST, dict, redo=redo).get("files")
        try:
            now = sealed_files(export)
        except MsfpError:  # its seal is damaged, or another pipeline is in its place
            return False
        return files is None or now is None or files == now

    def path(self, index: int) -> Path:
        """Return where batch `index` is or will be."""
        return self.directory / f"{index:05d}.safetensors"

    def missing(self) -> list[int]:
        """List the batches still to be drawn."""
        return [index for index in range(self.recipe.num_shards) if not self.path(index).exists()]

    def fill(self, pipe: Pipeline, *, title: str, processes: Processes = ALONE) -> None:
        """Draw the batches that are missing.

        Arguments:
            processes: where several draw the same gallery, each draws its own batches.
        """
        recipe = self.recipe
        part = processes.part(range(recipe.num_shards))
        own = [index for index in self.missing() if index in part]
        with processes.progress.task(f"Sampling {title}", len(recipe.conditions)) as advance:
            advance(min((recipe.num_shards - len(own)) * recipe.batch_size, len(recipe.conditions)))
            for index in own:
                first = index * recipe.batch_size
                conditions = recipe.conditions[first : first + recipe.batch_size]
                with watch_samples(pipe) as samples:
                    pictures, are_drawings = draw_stills(pipe, conditions, recipe, first=first)
                stacked = torch.from_numpy(np.stack([np.asarray(each) for each in pictures]))
                tensors = {
                    "latents": samples[-1].detach().float().cpu().contiguous(),
                    "pictures": stacked.permute(0, 3, 1, 2).contiguous(),
                }
                header = {_HEADER: self._header(index, tensors)}
                if are_drawings:
                    header[_DRAWINGS] = "true"
                write_tensors(self.path(index), tensors, header)
                advance(len(conditions))

    def latents(self) -> Tensor:
        """Return the final samples of all pictures, float32."""
        return torch.cat([self._read(index, "latents") for index in range(self.recipe.num_shards)])

    def pictures(self) -> Tensor:
        """Return all pictures, uint8 ``(pictures, 3, height, width)``."""
        return torch.cat([self._read(index, "pictures") for index in range(self.recipe.num_shards)])

    def holds_drawings(self) -> bool:
        """Whether its pictures are drawings of what is none: of sound or embeddings."""
        with open_tensors(self.path(0), redo=_REDO) as file:
            return _DRAWINGS in (file.metadata() or {})

    def _header(self, index: int, tensors: Mapping[str, Tensor]) -> str:
        """Return what a batch says of itself: its pictures, where they belong, and their digest."""
        return to_text({"gallery": self._identity, "index": index, "digest": digest(tensors)})

    @cached_property
    def _identity(self) -> str:
        """What tells this gallery from others: a digest of its manifest."""
        manifest = read_json(self.directory / _MANIFEST, dict, redo=_REDO)
        return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

    def _read(self, index: int, name: str) -> Tensor:
        """Read a tensor of a batch; those of earlier versions say nothing of themselves.

        Raises:
            RunError: the batch is missing.
            CheckpointError: it is truncated, altered, or of another gallery or place.
        """
        path = self.path(index)
        if not path.exists():
            raise RunError(f"{path} is missing; run the same `msfp evaluate` again to draw it")
        with open_tensors(path, redo=_REDO) as file:
            tensors: dict[str, Tensor] = {each: file.get_tensor(each) for each in file.keys()}
            header = (file.metadata() or {}).get(_HEADER)
        if header is not None and header != self._header(index, tensors):
            raise damaged(path, "its pictures are altered, or of another model", redo=_REDO)
        return tensors[name]
