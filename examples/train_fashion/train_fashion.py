"""Train a small StableDiffusionPipeline on Fashion-MNIST, from random weights to a saved directory.

A latent diffusion pipeline is learned in the order in which its parts depend on each other:

1. the autoencoder learns to squeeze a 32x32 colour picture into a 4x16x16 latent and back. Its
   latents are measured: `scaling_factor = 1 / standard deviation` makes them as wide as the unit
       noise that diffusion mixes into them;
2. the tokenizer learns the few words of the captions;
3. the text encoder and the UNet learn together to tell, from a noisy latent, its timestep and its
   caption, the noise in it. Some captions are left empty, so that the UNet also knows the
   unconditional answer that guidance needs;
4. the parts are saved together in half precision, reloaded as a user would, and asked for one
   picture of everything.

Fashion-MNIST is grey and has ten classes. Tinting each picture with one of eight colours makes
eighty things to ask for, and gives the captions two independent words to get right.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

KINDS = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
TINTS = {
    "white": (1.0, 1.0, 1.0),
    "red": (1.0, 0.15, 0.15),
    "green": (0.2, 0.9, 0.3),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (1.0, 0.95, 0.1),
    "orange": (1.0, 0.6, 0.1),
    "purple": (0.7, 0.25, 1.0),
    "cyan": (0.1, 0.95, 1.0),
}
# The plain sentence stands twice because it is what a user types most often.
TEMPLATES = ("a {} {}", "a {} {}", "a photo of a {} {}", "{} {}")
EMPTY_CAPTION_SHARE = 0.12
# Words of likely prompts that no caption holds: known to the tokenizer, they cost one token and not
# one a letter.
SPARE_WORDS = "an image the picture fashion clothing"

PICTURE_SIZE = 32
MAX_TOKENS = 16
BOS_TOKEN, EOS_TOKEN, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"

LEARNING_RATE = 1.5e-3
WARMUP_SHARE = 0.04
MAX_GRADIENT_NORM = 1.0
EMA_DECAY = 0.995
KL_WEIGHT = 1e-3
NUM_MEASURED_PICTURES = 1024
GUIDANCE_SCALE = 3.0
NUM_INFERENCE_STEPS = 20
SHEET_ZOOM = 2

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@dataclass(frozen=True, kw_only=True)
class Clothing:
    """Grey uint8 pictures (num_pictures, 32, 32), their classes, and coloured batches of them."""

    grey: Tensor
    labels: Tensor

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Draw tinted pictures (batch_size, 3, 32, 32) in [-1, 1] with their captions."""
        index = torch.randint(len(self.labels), (batch_size,), generator=generator)
        colours = torch.randint(len(TINTS), (batch_size,), generator=generator)
        tints = torch.tensor(list(TINTS.values()))[colours]
        pictures = tints[:, :, None, None] * (self.grey[index, None] / 255)
        return pictures * 2 - 1, draw_captions(self.labels[index], colours, generator)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a stage is trained: number of updates, batch size, and the seed of all that it draws."""

    num_steps: int
    batch_size: int
    seed: int


def load_clothing(path: Path, limit: int | None, seed: int) -> Clothing:
    """Load the npz file, pad the pictures from 28x28 to 32x32 and keep `limit` of them.

    Raises:
        SystemExit: there is no such file.
    """
    if not path.exists():
        raise SystemExit(f"{path} does not exist; README.md beside this script says what it holds")
    with np.load(path) as arrays:
        images, labels = (
            torch.from_numpy(arrays["images"]),
            torch.from_numpy(arrays["labels"]).long(),
        )
    # The file may be sorted by class: its first pictures would all be t-shirts.
    kept = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:limit]
    margin = (PICTURE_SIZE - images.shape[-1]) // 2
    return Clothing(grey=functional.pad(images[kept], (margin,) * 4), labels=labels[kept])


def draw_captions(labels: Tensor, colours: Tensor, generator: torch.Generator) -> list[str]:
    """Draw one caption for each class and colour, both (batch,), leaving some empty."""
    templates = torch.randint(len(TEMPLATES), labels.shape, generator=generator)
    is_empty = torch.rand(labels.shape, generator=generator) < EMPTY_CAPTION_SHARE
    names = list(TINTS)
    rows = zip(
        labels.tolist(), colours.tolist(), templates.tolist(), is_empty.tolist(), strict=True
    )
    return [
        "" if empty else TEMPLATES[form].format(names[tint], KINDS[kind])
        for kind, tint, form, empty in rows
    ]


def list_captions(templates: Iterable[str]) -> list[str]:
    """List every caption that the templates can give, class by class."""
    return [
        template.format(tint, kind) for template in templates for kind in KINDS for tint in TINTS
    ]


def build_autoencoder() -> AutoencoderKL:
    """Build the untrained autoencoder, (batch, 3, 32, 32) to (batch, 4, 16, 16) and back."""
    return AutoencoderKL(
        sample_size=PICTURE_SIZE,
        latent_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the untrained text encoder, token ids (batch, 16) to states (batch, 16, 64)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """Build the untrained UNet, noisy latents (batch, 4, 16, 16) to their noise."""
    return UNet2DConditionModel(
        sample_size=PICTURE_SIZE // 2,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Build the noise schedule of Stable Diffusion."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def optimise(
    label: str, parameters: list[nn.Parameter], num_steps: int, draw_loss: Callable[[], Tensor]
) -> float:
    """Minimise `draw_loss` and return the mean loss of the last tenth.

    The averaged weights are left in `parameters`.
    """
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    decay = get_cosine_schedule_with_warmup(
        optimizer, math.ceil(WARMUP_SHARE * num_steps), num_steps
    )
    average = EMAModel(parameters, decay=EMA_DECAY)
    losses: list[float] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}")) as progress:
        task = progress.add_task(label, total=num_steps, loss=math.nan)
        for _ in range(num_steps):
            loss = draw_loss()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            decay.step()
            average.step(parameters)
            losses.append(loss.item())
            progress.update(task, advance=1, loss=losses[-1])
    average.copy_to(parameters)
    return float(np.mean(losses[-math.ceil(num_steps / 10) :]))


def train_autoencoder(clothing: Clothing, schedule: Schedule) -> tuple[AutoencoderKL, float]:
    """Train the autoencoder to copy pictures, with a small pull towards unit latents."""
    autoencoder = build_autoencoder().train()
    generator = torch.Generator().manual_seed(schedule.seed)

    def draw_loss() -> Tensor:
        pictures, _ = clothing.draw(schedule.batch_size, generator)
        posterior = autoencoder.encode(pictures).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator)).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        error = functional.l1_loss(decoded, pictures) + functional.mse_loss(decoded, pictures)
        return error + KL_WEIGHT * divergence

    loss = optimise("autoencoder", list(autoencoder.parameters()), schedule.num_steps, draw_loss)
    return autoencoder.eval().requires_grad_(False), loss


@torch.no_grad()
def measure_autoencoder(
    autoencoder: AutoencoderKL, clothing: Clothing, seed: int
) -> tuple[float, float]:
    """Return the latents' standard deviation and the PSNR of encoding and decoding, in dB."""
    generator = torch.Generator().manual_seed(seed)
    pictures, _ = clothing.draw(NUM_MEASURED_PICTURES, generator)
    posterior = autoencoder.encode(pictures).latent_dist
    error = functional.mse_loss(autoencoder.decode(posterior.mode()).sample.clamp(-1, 1), pictures)
    # Pictures in [-1, 1] have a peak-to-peak range of 2.
    return posterior.sample(generator).std().item(), 10 * math.log10(2**2 / error.item())


def train_tokenizer() -> CLIPTokenizer:
    """Learn a byte-level byte pair encoding of the captions in the form CLIP's tokenizer has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every byte, inside a word and at its end, gets its id before training: any text can then be
    # written, and the ids do not hang on the order in which the trainer happens to meet the
    # letters.
    base_tokens = [BOS_TOKEN, EOS_TOKEN, *alphabet, *(byte + WORD_END for byte in alphabet)]
    trainer = trainers.BpeTrainer(
        special_tokens=base_tokens, end_of_word_suffix=WORD_END, show_progress=False
    )
    untrained = CLIPTokenizer().backend_tokenizer
    learned = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learned.normalizer, learned.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    learned.train_from_iterator([*list_captions(TEMPLATES), SPARE_WORDS], trainer)
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def train_denoiser(
    pipeline: StableDiffusionPipeline, clothing: Clothing, schedule: Schedule
) -> float:
    """Train text encoder and UNet together to predict the noise in a latent; return the loss."""
    vae, text_encoder, unet, scheduler = (
        pipeline.vae,
        pipeline.text_encoder,
        pipeline.unet,
        pipeline.scheduler,
    )
    generator = torch.Generator().manual_seed(schedule.seed)

    def draw_loss() -> Tensor:
        pictures, captions = clothing.draw(schedule.batch_size, generator)
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.sample(generator) * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(
            scheduler.config.num_train_timesteps, (len(latents),), generator=generator
        )
        noisy = scheduler.add_noise(latents, noise, timesteps)
        states = text_encoder(tokenize(pipeline.tokenizer, captions)).last_hidden_state
        return functional.mse_loss(unet(noisy, timesteps, states).sample, noise)

    text_encoder.train()
    unet.train()
    loss = optimise(
        "denoiser", [*text_encoder.parameters(), *unet.parameters()], schedule.num_steps, draw_loss
    )
    text_encoder.eval()
    unet.eval()
    return loss


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Turn captions into token ids (batch, 16), as the pipeline does."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def assemble_pipeline(autoencoder: AutoencoderKL) -> StableDiffusionPipeline:
    """Put the trained autoencoder together with a tokenizer and the untrained other parts."""
    tokenizer = train_tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder,
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(tokenizer),
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_half(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Save the pipeline as half precision safetensors; this rounds its weights in place."""
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.half()
    pipeline.save_pretrained(out, safe_serialization=True)


def draw_sheet(directory: Path, seed: int, num_inference_steps: int) -> Image.Image:
    """Sample every class (a row) in every colour (a column) from the saved pipeline."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        list_captions(["a {} {}"]),
        height=PICTURE_SIZE,
        width=PICTURE_SIZE,
        num_inference_steps=num_inference_steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(seed),
    ).images
    sheet = Image.new("RGB", (len(TINTS) * PICTURE_SIZE, len(KINDS) * PICTURE_SIZE))
    for number, picture in enumerate(pictures):
        row, column = divmod(number, len(TINTS))
        sheet.paste(picture, (column * PICTURE_SIZE, row * PICTURE_SIZE))
    return sheet.resize(
        (sheet.width * SHEET_ZOOM, sheet.height * SHEET_ZOOM), Image.Resampling.NEAREST
    )


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="The Fashion-MNIST npz file.")],
    out: Annotated[
        Path, typer.Option(help="The directory to write the pipeline to.", file_okay=False)
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into --out even if it exists.")
    ] = False,
    steps: Annotated[
        int, typer.Option(min=1, help="Updates of the text encoder and the UNet.")
    ] = 2500,
    autoencoder_steps: Annotated[
        int, typer.Option(min=1, help="Updates of the autoencoder.")
    ] = 1500,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one update.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many pictures, for a trial.")
    ] = None,
    sampler_steps: Annotated[
        int, typer.Option(min=1, help="Steps of the sampler for samples.png.")
    ] = NUM_INFERENCE_STEPS,
) -> None:
    """Train a small text-to-image StableDiffusionPipeline on tinted Fashion-MNIST and save it."""
    if out.exists() and not overwrite:
        raise typer.BadParameter(
            f"{out} exists; name another directory or add --overwrite", param_hint="--out"
        )
    start = time.monotonic()
    # Modules draw their first weights from torch's global generator, and from nowhere else.
    torch.manual_seed(seed)
    clothing = load_clothing(data, limit, seed)
    plan = Schedule(num_steps=autoencoder_steps, batch_size=batch_size, seed=seed + 1)
    autoencoder, loss = train_autoencoder(clothing, plan)
    latent_std, decibels = measure_autoencoder(autoencoder, clothing, seed + 2)
    autoencoder.register_to_config(scaling_factor=round(1 / latent_std, 5))
    quality = f"round trip {decibels:.1f} dB, latents' std {latent_std:.4f}"
    report(f"autoencoder: loss {loss:.4f}, {quality}", start)
    pipeline = assemble_pipeline(autoencoder)
    loss = train_denoiser(
        pipeline, clothing, Schedule(num_steps=steps, batch_size=batch_size, seed=seed + 3)
    )
    report(f"denoiser: loss {loss:.4f}", start)
    save_half(pipeline, out)
    draw_sheet(out, seed, sampler_steps).save(out / "samples.png")
    report(f"pipeline and samples.png written to {out}", start)


def report(message: str, start: float) -> None:
    """Print one line with the seconds that have passed since `start`."""
    typer.echo(f"{message} ({time.monotonic() - start:.0f} s)")


if __name__ == "__main__":
    app()
