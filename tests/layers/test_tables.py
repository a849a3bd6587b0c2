"""Quantized tables (nn.Embedding): rows that are looked up, from the search to the export."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import QUICK, Invoke
from msfp_cli.calibration.calibrate import calibrate_denoisers_
from msfp_cli.calibration.recipe import CalibrateRecipe
from msfp_cli.calibration.result import Calibration
from msfp_cli.checkpoint.pipeline import MSFPPipeline
from msfp_cli.evaluation.metrics.denoisers import input_histograms
from msfp_cli.finetuning.lora import tuned_names
from msfp_cli.finetuning.result import load_finetunings
from msfp_cli.formats.float_format import FloatFormat, formats_of_width
from msfp_cli.formats.rounding import Grid, dequantize, quantize
from msfp_cli.layers.kernels.lookup import Lookup
from msfp_cli.layers.kernels.registry import KERNELS, choose_kernel
from msfp_cli.layers.prepare import prepare_
from msfp_cli.layers.quantized import QuantEmbedding, QuantLinear
from msfp_cli.layers.replace import find_layers, quantized_layers
from msfp_cli.layers.scheme import LayerScheme
from msfp_cli.pipelines.loading import ModelSource, load_pipeline
from msfp_cli.recording.result import Recording
from msfp_cli.run import Run

E3M4 = FloatFormat.parse("e3m4")
TABLE = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table"


def table_of(
    rows: int = 7, width: int = 6, fmt: FloatFormat = E3M4
) -> tuple[QuantEmbedding, Tensor]:
    """A quantized table, and the float one's weight."""
    plain = nn.Embedding(rows, width)
    nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(rows * width))
    table = QuantEmbedding(plain, LayerScheme(weight=fmt, lookup=True))
    weight = plain.weight.detach()
    table.store_(weight, weight.abs().amax(dim=1) / fmt.largest)
    return table, weight


@given(
    st.sampled_from([f for bits in range(2, 9) for f in formats_of_width(bits, signed=True)]),
    st.integers(1, 9),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_looks_up_what_the_codes_stand_for(fmt: FloatFormat, width: int) -> None:
    table, weight = table_of(5, width, fmt)
    grid = Grid(fmt, (weight.abs().amax(dim=1) / fmt.largest)[:, None])
    expected = dequantize(quantize(weight, grid), grid)
    assert torch.equal(table.weight, expected)
    for index in (
        torch.arange(5),
        torch.tensor([[4, 0], [4, 4]]),
        torch.tensor(3),
        torch.zeros(0, 2, dtype=torch.int),
    ):
        assert torch.equal(table(index), expected[index.long()])


def test_eight_bits_are_close() -> None:
    table, weight = table_of(50, 64)
    error = (table(torch.arange(50)) - weight).square().sum() / weight.square().sum()
    assert 0 < error < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_have_the_type_of_the_model(dtype: torch.dtype) -> None:
    table, _ = table_of()
    index = torch.tensor([1, 6])
    rows = table(index)
    table.to(dtype)
    assert table.weight_scale.dtype == torch.float32
    assert torch.equal(table(index), rows.to(dtype)) and table(index).dtype == dtype
    born_short = QuantEmbedding(nn.Embedding(3, 4).to(dtype), LayerScheme(weight=E3M4, lookup=True))
    assert born_short(index[:1]).dtype == dtype


def test_index_out_of_range_is_an_error() -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        table_of()[0](torch.tensor([7]))


def test_state_and_copies_keep_the_rows() -> None:
    table, _ = table_of()
    index = torch.arange(7)
    assert set(table.state_dict()) == {"weight_codes", "weight_scale"}
    other = QuantEmbedding(nn.Embedding(7, 6), table.scheme)
    other.load_state_dict(table.state_dict())
    for twin in (other, copy.deepcopy(table)):
        assert torch.equal(twin(index), table(index))
    assert isinstance(table, nn.Embedding) and "weight=e3m4" in repr(table)


@pytest.mark.parametrize("prepared", [True, False])
def test_compiles_without_a_graph_break(prepared: bool) -> None:
    table, _ = table_of(
        fmt=FloatFormat.parse("e3m4")
    )  # a fresh one, whose code book nobody has asked for
    if prepared:
        table.prepare_()
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(table), fullgraph=True, backend="aot_eager")
    index = torch.tensor([[1, 2], [3, 3]])
    assert torch.equal(compiled(index), table(index))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Embedding(3, 4)
        self.clipping = nn.Embedding(3, 4, max_norm=1.0)
        self.line = nn.Linear(4, 4)


def test_tables_that_change_their_rows_are_left_alone() -> None:
    assert list(find_layers(Net())) == ["plain", "line"]


@pytest.mark.parametrize("change", [{"hub": 2}, {"input": Grid(E3M4, 1.0)}])
def test_tables_have_no_hub_and_no_input(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a table has neither a hub"):
        LayerScheme(**({"weight": E3M4, "lookup": True} | change))  # type: ignore[arg-type]


def test_parameters_survive_json_and_those_of_layers_are_as_before() -> None:
    scheme = LayerScheme(weight=E3M4, lookup=True)
    assert LayerScheme.from_json(scheme.to_json()) == scheme
    assert "lookup" not in LayerScheme(weight=E3M4).to_json()


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
def test_a_table_has_one_kernel(kernel: str) -> None:
    table, _ = table_of()
    assert choose_kernel(table, kernel) == (Lookup, "")


def test_the_kernel_of_tables_runs_nothing_else() -> None:
    line = QuantLinear(nn.Linear(2, 2), LayerScheme(weight=E3M4))
    assert choose_kernel(line)[0] is not Lookup and Lookup.kinds == {QuantEmbedding.kind}


def test_a_refusal_names_a_layer_rather_than_a_table() -> None:
    line = QuantLinear(nn.Linear(2, 2), LayerScheme(weight=E3M4))
    with pytest.raises(
        Exception,
        match="'cpu' can run none of the 2 layers; 1: cpu: the input is in floating point",
    ):
        prepare_(nn.Sequential(table_of()[0], line), "cpu")


@pytest.mark.parametrize(
    ("recipe", "fmt_bits"),
    [(QUICK, 8), (replace(QUICK, keep=(*QUICK.keep, "*embedding_table:5")), 5)],
    ids=["default", "rule"],
)
def test_calibration_keeps_tables_at_eight_bits_unless_a_rule_speaks(
    calibrated: Callable[[str], Run], recipe: CalibrateRecipe, fmt_bits: int
) -> None:
    run = calibrated("DiTPipeline")
    pipe = load_pipeline(Calibration.load(run.calibration).source, "cpu")
    index = torch.arange(3)
    rows = pipe.transformer.get_submodule(TABLE)(index)
    choice = calibrate_denoisers_(
        pipe, Recording(run.recording), Recording(run.held_out), recipe
    ).layers["transformer"][TABLE]
    assert (choice.kind, choice.reason, choice.multiply_adds) == ("embedding", "kept", 0)
    assert choice.scheme.weight is not None and choice.scheme.weight.bits == fmt_bits
    assert choice.scheme.lookup and choice.input_scores == () and choice.weight_scores
    got = pipe.transformer.get_submodule(TABLE)(index)
    assert 0 < (got - rows).square().sum() < 10 ** (1 - 0.5 * fmt_bits) * rows.square().sum()


@pytest.mark.parametrize(
    "change", [{"weights": None}, {"keep": ("*embedding_table:none",)}], ids=str
)
def test_tables_can_stay_in_floating_point(
    calibrated: Callable[[str], Run], change: dict[str, object]
) -> None:
    run = calibrated("DiTPipeline")
    pipe = load_pipeline(Calibration.load(run.calibration).source, "cpu")
    calibration = calibrate_denoisers_(
        pipe, Recording(run.recording), Recording(run.held_out), replace(QUICK, **change)
    )
    assert type(pipe.transformer.get_submodule(TABLE)) is nn.Embedding
    assert TABLE not in calibration.table("transformer")


def test_export_holds_tables_and_fine_tuning_leaves_them(
    fresh_run: Callable[..., Run], msfp: Invoke
) -> None:
    run = fresh_run()
    calibration = Calibration.load(run.calibration)
    assert TABLE not in tuned_names(calibration.table("transformer"))
    for command in ("finetune --steps 2 --batch-size 2 --rank 2 --device cpu", "export"):
        assert msfp(*command.split(), "--run", run.directory).exit_code == 0
    tuned = load_finetunings(run, calibration)["transformer"]
    assert not any(name.startswith(f"{TABLE}.") for name in tuned.tensors_of("best"))
    pipe = MSFPPipeline.from_pretrained(run.latest_export(), device="cpu")
    table = quantized_layers(pipe.transformer)[TABLE]
    plain = load_pipeline(
        ModelSource(model=calibration.source.model), "cpu"
    ).transformer.get_submodule(TABLE)
    index = torch.tensor([2, 0])
    grid = Grid(table.weight_grid().format, calibration.scales["transformer"][TABLE][index, None])
    assert torch.equal(table(index), dequantize(quantize(plain.weight[index], grid), grid))
    assert "lookup (" in pipe.describe()


def test_histograms_leave_tables_out(calibrated: Callable[[str], Run]) -> None:
    run = calibrated("DiTPipeline")
    pipe = load_pipeline(Calibration.load(run.calibration).source, "cpu")
    calls = list(Recording(run.held_out).calls("transformer"))[:1]
    found = input_histograms(pipe.transformer, calls)
    assert found.keys() == {
        name for name in find_layers(pipe.transformer) if "embedding_table" not in name
    }
