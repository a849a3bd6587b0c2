r"""Compute the features of real pictures that the built-in pipeline's are compared with.

    python examples/train_fashion/make_reference.py --test fashion_mnist_test.npz \
        --out fashion_reference.safetensors

Fashion-MNIST's test pictures, tinted at random as for the pipeline, through the classifier that
comes with msfp.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from train_classifier import tint
from train_fashion import TINTS, load_clothing

from msfp_cli.evaluation.features.extractors import load_extractor


def main(
    test: Annotated[Path, typer.Option(help="Fashion-MNIST's test pictures, npz.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    pictures: Annotated[int, typer.Option(min=2, help="How many.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice and of the tints.")] = 0,
) -> None:
    """Compute the features and save them in half precision."""
    clothing = load_clothing(test, pictures, seed)
    colours = torch.randint(
        len(TINTS), clothing.labels.shape, generator=torch.Generator().manual_seed(seed)
    )
    tinted = (tint(clothing.grey, colours) * 255).round().to(torch.uint8)
    features = load_extractor("fashion").features(tinted)
    save_file({"features": features.half().contiguous()}, out)
    typer.echo(f"{out} written: {tuple(features.shape)}")


if __name__ == "__main__":
    typer.run(main)
