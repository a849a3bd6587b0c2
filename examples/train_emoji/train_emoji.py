"""Train a small unconditional DDIMPipeline on the Noto emoji, from random weights.

There is no autoencoder, no text encoder, no guidance. The UNet sees a 32x32 colour picture mixed
with noise and predicts the velocity ``v = sqrt(a) noise - sqrt(1 - a) picture``, where ``a`` is the
share of the picture's power left at that timestep (Salimans and Ho 2022, arXiv:2202.00512). In
strong noise that is the picture itself, negated, so the sampler, which starts from almost pure
noise, gets the white around most emoji right. The schedule is DDPM's linear one, for the sake of
quantization: a step turns (picture, noise) by an angle, and an error of the velocity counts in
proportion to its sine; the cosine schedule would make all these angles equal.

Training lasts a number of updates or a number of minutes. The learning rate is constant first and
falls linearly to zero over the last part. Only where it begins to fall must the number of updates
be known, so a run by the minute settles it there, from the pace until then, and says it: given as
`--steps`, it repeats the run byte for byte.
"""

import copy
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

PICTURE_SIZE = 32
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100
# The learning rate falls over this last part of the updates.
DECAY_SHARE = 0.4
EMA_DECAY = 0.998
MAX_GRADIENT_NORM = 1.0
REPORT_STEPS = 100
NUM_INFERENCE_STEPS = 25
SHEET_SIDE = 8

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to train, on how much, and how often to save.

    Arguments:
        num_steps: updates; None settles them from the pace, so that training takes about
            `num_minutes`.
        num_minutes: minutes to train for; read only where `num_steps` is None.
        batch_size: pictures in one update.
        seed: seed of everything that is drawn.
        save_minutes: minutes between two saves.
    """

    num_steps: int | None
    num_minutes: float
    batch_size: int
    seed: int
    save_minutes: float


def load_pictures(path: Path) -> Tensor:
    """Load the pictures in [-1, 1], (count, 3, 32, 32); each pixel is the mean of a square.

    Raises:
        SystemExit: there is no such file.
    """
    if not path.exists():
        raise SystemExit(f"{path} does not exist; README.md beside this script says what it holds")
    with np.load(path, allow_pickle=False) as arrays:
        pictures = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float()
    return functional.avg_pool2d(pictures, pictures.shape[-1] // PICTURE_SIZE) / 127.5 - 1


def build_unet() -> UNet2DModel:
    """Build the untrained UNet, noisy pictures (batch, 3, 32, 32) to velocities."""
    return UNet2DModel(
        sample_size=PICTURE_SIZE,
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Build DDPM's linear noise schedule, sampled from its very last timestep on."""
    return DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")


def compute_learning_rate(step: int, num_steps: int | None) -> float:
    """Return an update's learning rate: warm-up, constant, linear to zero once the end is known."""
    left = math.inf if num_steps is None else (num_steps - step) / (DECAY_SHARE * num_steps)
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS, left)


def draw_loss(
    unet: UNet2DModel, scheduler: DDIMScheduler, pictures: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the squared error of the velocities of noisy pictures, half of them flipped."""
    flipped = torch.rand(len(pictures), 1, 1, 1, generator=generator) < 0.5
    pictures = torch.where(flipped, pictures.flip(-1), pictures)
    noise = torch.randn(pictures.shape, generator=generator)
    timesteps = torch.randint(
        scheduler.config.num_train_timesteps, (len(pictures),), generator=generator
    )
    noisy = scheduler.add_noise(pictures, noise, timesteps)
    velocity = scheduler.get_velocity(pictures, noise, timesteps)
    return functional.mse_loss(unet(noisy, timesteps).sample, velocity)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Make one update of the parameters, with the gradient clipped."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
    optimizer.step()


def save_pipeline(average: EMAModel, pipeline: DDIMPipeline, out: Path) -> None:
    """Save the averaged weights in half precision."""
    average.copy_to(pipeline.unet.parameters())
    save_whole(pipeline, out)


def save_whole(pipeline: DiffusionPipeline, out: Path) -> None:
    """Save a pipeline; a reader, or a kill, meets whole files only."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    if not out.exists():
        partial.rename(out)
        return
    for file in list(partial.rglob("*.*")):
        file.replace(out / file.relative_to(partial))
    shutil.rmtree(partial)


def train(pictures: Tensor, plan: Plan, out: Path) -> None:
    """Train a UNet by the plan; save the average of its weights now and then, and at the end."""
    # Modules draw their first weights from torch's global generator.
    torch.manual_seed(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    unet = build_unet().train()
    scheduler = build_scheduler()
    pipeline = DDIMPipeline(unet=copy.deepcopy(unet).half().eval(), scheduler=scheduler)
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    average = EMAModel(parameters, decay=EMA_DECAY)
    num_parameters = sum(parameter.numel() for parameter in parameters)
    report(f"{len(pictures)} pictures, {num_parameters} parameters", 0)
    start = saved = time.monotonic()
    num_steps = plan.num_steps
    step = 0
    losses = []
    while num_steps is None or step < num_steps:
        for group in optimizer.param_groups:
            group["lr"] = compute_learning_rate(step, num_steps)
        chosen = torch.randint(len(pictures), (plan.batch_size,), generator=generator)
        loss = draw_loss(unet, scheduler, pictures[chosen], generator)
        descend(loss, optimizer, parameters)
        average.step(parameters)
        losses.append(loss.item())
        step += 1
        now = time.monotonic()
        if num_steps is None and now - start >= (1 - DECAY_SHARE) * plan.num_minutes * 60:
            num_steps = math.ceil(step / (1 - DECAY_SHARE))
            notice = f"the learning rate falls from here on; --steps {num_steps} repeats this run"
            report(notice, now - start)
        if step % REPORT_STEPS == 0 or step == num_steps:
            report(f"update {step}: loss {np.mean(losses[-REPORT_STEPS:]):.4f}", now - start)
        if now - saved >= plan.save_minutes * 60 or step == num_steps:
            save_pipeline(average, pipeline, out)
            saved = now


def draw_sheet(directory: Path, seed: int, num_inference_steps: int) -> Image.Image:
    """Sample a square sheet of pictures from the saved pipeline, reloaded as a user would."""
    pipeline = DDIMPipeline.from_pretrained(directory, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    pictures = pipeline(
        SHEET_SIDE**2, generator=generator, num_inference_steps=num_inference_steps
    ).images
    return make_image_grid(pictures, SHEET_SIDE, SHEET_SIDE)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="The Noto emoji npz file.")],
    out: Annotated[
        Path, typer.Option(help="The directory to write the pipeline to.", file_okay=False)
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into --out even if it exists.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates, instead of --minutes.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Train for about so long; 50 by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one update.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    save_minutes: Annotated[float, typer.Option(min=0, help="Minutes between two saves.")] = 4,
    sampler_steps: Annotated[
        int, typer.Option(min=1, help="Steps of the sampler for samples.png.")
    ] = NUM_INFERENCE_STEPS,
) -> None:
    """Train a small unconditional DDIMPipeline on the Noto emoji and save it."""
    if out.exists() and not overwrite:
        raise typer.BadParameter(
            f"{out} exists; name another directory or add --overwrite", param_hint="--out"
        )
    if steps is not None and minutes is not None:
        raise typer.BadParameter("give --steps or --minutes, not both", param_hint="--steps")
    plan = Plan(
        num_steps=steps,
        num_minutes=minutes or 50,
        batch_size=batch_size,
        seed=seed,
        save_minutes=save_minutes,
    )
    train(load_pictures(data), plan, out)
    draw_sheet(out, seed, sampler_steps).save(out / "samples.png")
    typer.echo(f"pipeline and samples.png written to {out}")


def report(message: str, seconds: float) -> None:
    """Print one line with the seconds that training has taken."""
    print(f"{message} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    app()
