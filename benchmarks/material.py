"""What benchmarks share: what they record and test on, and the settings that the tables in docs/ were made with.

Forty prompts are fewer than `msfp calibrate` takes by default: a calibration wants no more, and
benchmarks make many.
"""

from msfp_cli.finetuning.recipe import FinetuneRecipe
from msfp_cli.pipelines.loading import BUILT_IN, default_prompts
from msfp_cli.recording.recipe import RecordOptions

RECORD = RecordOptions(num_images=40)
# The defaults of that time.
FORMER = FinetuneRecipe(
    batch_size=8, lanes=1, rank=16, learning_rate=1e-2, router_learning_rate=1e-3, loss_power=1.0
)
UNSEEN = default_prompts(BUILT_IN)[40:150]
