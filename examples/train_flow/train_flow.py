"""Train a small transformer with flow matching, from random weights to a stock CogView4Pipeline.

The transformer draws what the built-in pipeline draws: pictures of clothing in eight colours, asked
for by words. It works on the latents of that pipeline's autoencoder and reads the tokens of its
tokenizer; both stay as they are. What is trained, together, are a text encoder and the transformer:
image patches and words are one sequence, and the timestep scales, shifts and gates what each block
adds (adaLN-Zero, Peebles and Xie 2023, arXiv:2212.09748).

Flow matching: a latent ``x`` and noise ``n`` are joined by the straight line
``(1 - sigma) x + sigma n``, and the transformer learns its direction ``n - x`` at each ``sigma``
between 0 and 1. As in Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206) ``sigma`` is the
logistic function of a normal number, so that the middle of the line, which is the hardest, is seen
most.

The state of the training is saved now and then, and the same command goes on with it, bit for bit:
everything that an update draws depends on the seed and the number of the update alone. The learning
rate falls over the last part of the updates. With a different `--steps` a run is made shorter or
longer while it goes on.
"""

import copy
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import (
    AutoencoderKL,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer, GlmConfig, GlmModel

from msfp_cli.evaluation.features.fashion import agreement, load_classifier

for example in ("train_emoji", "train_fashion"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / example))
from train_emoji import save_whole  # noqa: E402
from train_fashion import (  # noqa: E402
    GUIDANCE_SCALE,
    MAX_GRADIENT_NORM,
    NUM_INFERENCE_STEPS,
    PICTURE_SIZE,
    SHEET_ZOOM,
    TINTS,
    Clothing,
    list_captions,
    load_clothing,
)

BUILT_IN = Path(__file__).resolve().parents[2] / "src/msfp_cli/data/fashion"
TEXT_WIDTH = 64
TOKEN_MULTIPLE = 16  # the pipeline fills prompts up to this many tokens, at their beginning
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100
# The learning rate falls over this last part of the updates.
DECAY_SHARE = 0.4
EMA_DECAY = 0.998
REPORT_STEPS = 50

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to train, on how much, and how often to save.

    Arguments:
        num_steps: updates.
        batch_size: pictures in one update.
        seed: seed of everything that is drawn.
        save_minutes: minutes between two saves.
        stop_after: updates after which this run stops; None for the last.
    """

    num_steps: int
    stop_after: int | None
    batch_size: int
    seed: int
    save_minutes: float


class Learner(nn.Module):
    """What is trained.

    Arguments:
        vocabulary: the number of the tokenizer's tokens.
        padding: the token that fills prompts up.
    """

    def __init__(self, vocabulary: int, padding: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(vocabulary, padding)
        self.transformer = build_transformer()


def build_text_encoder(vocabulary: int, padding: int) -> GlmModel:
    """Build the untrained text encoder; the pipeline reads what goes into the last of its layers.

    That layer is therefore never trained.
    """
    config = GlmConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=TEXT_WIDTH // 4,
        pad_token_id=padding,
    )
    return GlmModel(config)


def build_transformer() -> CogView4Transformer2DModel:
    """Build the untrained transformer: latents (batch, 4, 16, 16) to directions.

    Its blocks add nothing at first, and the directions are zero.
    """
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=64,
        condition_dim=16,
        sample_size=PICTURE_SIZE // 2,
        rope_axes_dim=(8, 8),
    )
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def assemble_pipeline(
    learner: Learner, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer
) -> CogView4Pipeline:
    """Put the parts together; the timesteps of the sampler are evenly spaced."""
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=learner.text_encoder,
        vae=autoencoder,
        transformer=learner.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def compute_learning_rate(step: int, num_steps: int) -> float:
    """Return an update's learning rate: warm-up, constant, linear to zero."""
    left = (num_steps - step) / (DECAY_SHARE * num_steps)
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS, left)


def compute_average_decay(step: int) -> float:
    """Return the share of the old average that an update keeps; the first are soon forgotten."""
    return min(EMA_DECAY, (1 + step) / (10 + step))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Turn captions into token ids (batch, 16), as the pipeline does."""
    tokens = tokenizer(captions, padding="longest", return_tensors="pt").input_ids
    missing = -tokens.shape[1] % TOKEN_MULTIPLE
    return functional.pad(tokens, (missing, 0), value=tokenizer.pad_token_id)


def draw_loss(
    learner: Learner,
    frozen: tuple[AutoencoderKL, CLIPTokenizer],
    clothing: Clothing,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the squared error of the directions from latents to noise."""
    autoencoder, tokenizer = frozen
    pictures, captions = clothing.draw(batch_size, generator)
    with torch.no_grad():
        posterior = autoencoder.encode(pictures).latent_dist
        latents = posterior.sample(generator) * autoencoder.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    sigmas = torch.randn(batch_size, generator=generator).sigmoid()
    noisy = torch.lerp(latents, noise, sigmas[:, None, None, None])
    tokens = tokenize(tokenizer, captions)
    states = learner.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    size = torch.full((batch_size, 2), float(PICTURE_SIZE))
    directions = learner.transformer(
        hidden_states=noisy,
        encoder_hidden_states=states,
        timestep=sigmas * 1000,
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros_like(size),
        return_dict=False,
    )[0]
    return functional.mse_loss(directions, noise - latents)


class Training:
    """A training that can be stopped and goes on: weights, their average, AdamW's moments.

    Arguments:
        learner: what is trained.
        path: where its state is kept.
    """

    def __init__(self, learner: Learner, path: Path) -> None:
        self.learner = learner
        self.path = path
        self.step = 0
        self.average = copy.deepcopy(learner).eval().requires_grad_(False)
        self.parameters = list(learner.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        if path.exists():
            self._load()

    def _load(self) -> None:
        with safe_open(self.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.step = int(file.metadata()["step"])
        states = dict[str, dict[str, Tensor]]()
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            states.setdefault(part, {})[rest] = tensor
        self.learner.load_state_dict(states["weights"])
        self.average.load_state_dict(states["average"])
        for name, tensor in states["moments"].items():
            number, _, kind = name.partition("/")
            self.optimizer.state[self.parameters[int(number)]][kind] = tensor

    def save(self) -> None:
        """Save the state; a reader, or a kill, meets a whole file only."""
        tensors = {f"weights/{name}": value for name, value in self.learner.state_dict().items()}
        for name, value in self.average.state_dict().items():
            tensors[f"average/{name}"] = value
        for number, parameter in enumerate(self.parameters):
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"moments/{number}/{kind}"] = value
        partial = self.path.with_name(self.path.name + ".partial")
        save_file(tensors, partial, {"step": str(self.step)})
        partial.replace(self.path)

    def descend(self, loss: Tensor, learning_rate: float) -> None:
        """Make one update, with the gradient clipped, and move the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        self.optimizer.step()
        share = 1 - compute_average_decay(self.step)
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.parameters, strict=True):
                mean.lerp_(parameter, share)
        self.step += 1


def save_pipeline(learner: Learner, frozen: tuple[AutoencoderKL, CLIPTokenizer], out: Path) -> None:
    """Save in half precision."""
    autoencoder, tokenizer = (copy.deepcopy(part) for part in frozen)
    pipeline = assemble_pipeline(copy.deepcopy(learner).half(), autoencoder.half(), tokenizer)
    save_whole(pipeline, out)


def train(clothing: Clothing, plan: Plan, out: Path) -> None:
    """Train by the plan, or go on with it; save state and pipeline now and then, and at the end."""
    # Modules draw their first weights from torch's global generator.
    torch.manual_seed(plan.seed)
    tokenizer = CLIPTokenizer.from_pretrained(BUILT_IN / "tokenizer")
    autoencoder = AutoencoderKL.from_pretrained(BUILT_IN / "vae", dtype=torch.float32)
    frozen = (autoencoder.eval().requires_grad_(False), tokenizer)
    learner = Learner(len(tokenizer), tokenizer.pad_token_id).train()
    training = Training(learner, state_path(out))
    sizes = [sum(part.numel() for part in module.parameters()) for module in learner.children()]
    report(f"text encoder {sizes[0]}, transformer {sizes[1]} parameters; {training.step} done", 0)
    start = saved = time.monotonic()
    losses = []
    last = min(plan.num_steps, plan.stop_after or plan.num_steps)
    while training.step < last:
        generator = torch.Generator().manual_seed((plan.seed << 32) + training.step)
        loss = draw_loss(learner, frozen, clothing, plan.batch_size, generator)
        training.descend(loss, compute_learning_rate(training.step, plan.num_steps))
        losses.append(loss.item())
        now = time.monotonic()
        is_last = training.step == last
        if training.step % REPORT_STEPS == 0 or is_last:
            mean = statistics.fmean(losses[-REPORT_STEPS:])
            report(f"update {training.step}: loss {mean:.4f}", now - start)
        if now - saved >= plan.save_minutes * 60 or is_last:
            training.save()
            save_pipeline(training.average, frozen, out)
            saved = now


def state_path(out: Path) -> Path:
    """Return where the state of the training of a pipeline is kept: beside it."""
    return out.with_name(out.name + ".state.safetensors")


def draw_sheet(directory: Path, seed: int, num_inference_steps: int) -> Image.Image:
    """Sample every class (a row) in every colour (a column) from the saved pipeline.

    It prints how many pictures msfp's classifier takes for what was asked for.
    """
    pipeline = CogView4Pipeline.from_pretrained(directory, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    captions = list_captions(["a {} {}"])
    pictures = pipeline(
        captions,
        num_inference_steps=num_inference_steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    garments, colours = agreement(load_classifier(), pictures, captions)
    print(f"{len(captions)} pictures: {garments:.1%} right garments, {colours:.1%} right colours")
    drawn = pipeline.image_processor.postprocess(pictures * 2 - 1, output_type="pil")
    sheet = make_image_grid(drawn, len(captions) // len(TINTS), len(TINTS))
    size = (sheet.width * SHEET_ZOOM, sheet.height * SHEET_ZOOM)
    return sheet.resize(size, Image.Resampling.NEAREST)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="The Fashion-MNIST npz file.")],
    out: Annotated[
        Path, typer.Option(help="The directory to write the pipeline to.", file_okay=False)
    ],
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 3000,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Stop after this update; --steps ends the training.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one update.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    save_minutes: Annotated[float, typer.Option(min=0, help="Minutes between two saves.")] = 4,
    sampler_steps: Annotated[
        int, typer.Option(min=1, help="Steps of the sampler for samples.png.")
    ] = NUM_INFERENCE_STEPS,
) -> None:
    """Train a small text-to-image transformer on tinted Fashion-MNIST, or go on with that."""
    if out.exists() and not state_path(out).exists():
        raise typer.BadParameter(
            f"{out} exists, and {state_path(out)} does not; name another directory",
            param_hint="--out",
        )
    plan = Plan(
        num_steps=steps,
        stop_after=stop_after,
        batch_size=batch_size,
        seed=seed,
        save_minutes=save_minutes,
    )
    train(load_clothing(data, None, seed), plan, out)
    draw_sheet(out, seed, sampler_steps).save(out / "samples.png")
    typer.echo(f"pipeline and samples.png written to {out}")


def report(message: str, seconds: float) -> None:
    """Print one line with the seconds that this run has taken."""
    print(f"{message} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    app()
