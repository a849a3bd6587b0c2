"""How the LoRA hubs and the router are trained; nothing here needs torch."""

from dataclasses import dataclass

from msfp_cli.pipelines.sampling import MAX_SEED
from msfp_cli.recipe import Recipe, option

LOSSES = ("dfa", "plain")
INITS = ("zero", "svd")
SAMPLINGS = ("error", "uniform")
PRECISIONS = ("no", "bf16")
MAX_HUB = 255
ROUTER_WIDTH = 64  # of its timestep embedding and of its hidden layer


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """How to train the LoRA hubs and the router."""

    PRESETS = {"paper": {"loss_power": 1.0, "input_learning_rate": 0.0, "timesteps": "uniform"}}

    steps: int = option(500, "Updates of the trained parameters.", at_least=1)
    batch_size: int = option(
        16, "Recorded rows in a denoiser call; every row has its own timestep.", at_least=1
    )
    calls_per_update: int = option(
        2,
        "Denoiser calls per update. Each covers its own part of the timesteps; processes share "
        "them.",
        names=("--calls-per-update", "--gradient-accumulation"),
        at_least=1,
        formerly="lanes",
    )
    hub_size: int = option(
        2,
        "LoRAs of each layer, among which the timestep chooses; 1 is a plain LoRA.",
        at_least=1,
        at_most=MAX_HUB,
    )
    rank: int = option(32, "Rank of each LoRA.", at_least=1)
    init: str = option(
        "zero",
        "How a LoRA begins: zero changes nothing, svd begins with the singular value decomposition "
        "of the weight's rounding error.",
        choices=INITS,
    )
    learning_rate: float = option(
        1e-2,
        "Learning rate of the LoRAs, in steps of the weight's grid; it decays linearly to 0.",
        above=0,
    )
    router_learning_rate: float = option(
        1e-4,
        "Learning rate of the router. If it is high, timesteps change their LoRA before the LoRAs "
        "have learned.",
        above=0,
    )
    input_learning_rate: float = option(
        1e-3,
        "Learning rate of the scale and zero point of each layer's input; 0 leaves them as "
        "calibrated.",
        at_least=0,
    )
    loss: str = option(
        "dfa",
        "Weight of each timestep in the loss: dfa weights by the denoising factor, plain weights "
        "all alike, and is the default where that factor is not known.",
        choices=LOSSES,
    )
    loss_power: float = option(
        0.25, "Exponent of the denoising factor with --loss dfa.", above=0, at_most=4
    )
    timesteps: str = option(
        "error",
        "How often a timestep is trained: error in proportion to the error that quantization makes "
        "there, uniform all alike.",
        choices=SAMPLINGS,
    )
    mixed_precision: str = option(
        "no",
        "Type that the denoiser computes in while it is trained: no (its own) or bf16.",
        choices=PRECISIONS,
    )
    seed: int = option(
        0, "Seed of the initial LoRAs and of the order of the data.", at_least=0, at_most=MAX_SEED
    )
    evaluate_every: int = option(
        250, "Updates between two measurements on the held-out calls.", at_least=1
    )
