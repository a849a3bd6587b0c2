r"""Train the classifier that tells whether a fashion picture shows what its prompt says.

    python examples/train_fashion/train_classifier.py --data fashion_mnist_train.npz \
        --test fashion_mnist_test.npz --out fashion_classifier.safetensors

Fashion-MNIST, padded to 32x32 and tinted as for the pipeline, in 0..1. Pictures are flipped,
shifted by up to two pixels, blurred a little (as the pipeline's autoencoder does) and given a
little noise, so that the classifier judges what is drawn and not how it was made.
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from train_fashion import TINTS, Clothing, load_clothing

from msfp_cli.evaluation.features.fashion import COLOURS, GarmentClassifier

assert tuple(TINTS) == COLOURS


def draw(
    clothing: Clothing, batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw tinted and disturbed pictures ``(batch, 3, 32, 32)`` in 0..1, classes and colours."""
    index = torch.randint(len(clothing.labels), (batch_size,), generator=generator)
    colours = torch.randint(len(TINTS), (batch_size,), generator=generator)
    pictures = tint(clothing.grey[index], colours)
    if torch.rand((), generator=generator) < 0.5:
        pictures = pictures.flip(-1)
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    pictures = pictures.roll(shift, dims=(-2, -1))
    if torch.rand((), generator=generator) < 0.5:
        padded = functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
        pictures = functional.avg_pool2d(padded, 3, stride=1)
    noise = torch.randn(pictures.shape, generator=generator)
    noise = noise * 0.05 * torch.rand((), generator=generator)
    return (pictures + noise).clamp(0, 1), clothing.labels[index], colours


def tint(grey: Tensor, colours: Tensor) -> Tensor:
    """Colour grey uint8 pictures."""
    return torch.tensor(list(TINTS.values()))[colours][:, :, None, None] * (grey[:, None] / 255)


@torch.no_grad()
def accuracy(model: GarmentClassifier, clothing: Clothing, seed: int) -> tuple[float, float]:
    """Return the shares of right classes and of right colours."""
    colours = torch.randint(
        len(TINTS), clothing.labels.shape, generator=torch.Generator().manual_seed(seed)
    )
    right = torch.zeros(2)
    for part in torch.arange(len(colours)).split(500):
        garment, colour = model(tint(clothing.grey[part], colours[part]))
        right[0] += (garment.argmax(1) == clothing.labels[part]).sum()
        right[1] += (colour.argmax(1) == colours[part]).sum()
    return float(right[0] / len(colours)), float(right[1] / len(colours))


def main(
    data: Annotated[Path, typer.Option(help="Fashion-MNIST's training pictures, npz.")],
    test: Annotated[Path, typer.Option(help="Fashion-MNIST's test pictures, npz.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 2500,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one update.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
) -> None:
    """Train the classifier and save it."""
    torch.manual_seed(seed)
    start = time.monotonic()
    generator = torch.Generator().manual_seed(seed)
    clothing = load_clothing(data, None, seed)
    unseen = load_clothing(test, None, seed)
    model = GarmentClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1
    )
    for step in range(1, steps + 1):
        pictures, labels, colours = draw(clothing, batch_size, generator)
        garment, colour = model(pictures)
        loss = functional.cross_entropy(garment, labels, label_smoothing=0.05)
        loss = loss + functional.cross_entropy(colour, colours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            model.eval()
            shares = accuracy(model, unseen, seed)
            model.train()
            right = f"{shares[0]:.3f} class, {shares[1]:.3f} colour"
            typer.echo(f"{step}: loss {loss:.3f}, test pictures {right}")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out)
    typer.echo(f"{out} written ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    typer.run(main)
