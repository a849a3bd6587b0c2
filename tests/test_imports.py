import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import msfp_cli

SOURCE = Path(msfp_cli.__file__).parent

# Who may import whom at the top of a module: only what stands on the same floor or below, and never in a circle.
FLOORS = {
    5: "__main__ commands",
    4: "calibrate chain demo evaluate export finetune measuring record report sample subjects",
    3: "batches calibration denoiser evaluation figures gallery generation loading measures noise observe pipeline "
    "quantizer recording reproduce rows run sensitivity student surgery training tuned",
    2: "extractors kernels layers plots reference search talora",
    1: "asked atomic classifier clip cost denoising digest metrics packing parameters processes report_page "
    "rounding router routing squeezenet",
    0: "__init__ errors formats keep progress recipe registration",
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()}
NO_TORCH = ("errors", "formats", "keep", "recipe", "progress", "registration", "atomic")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def top_level_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield what runs on import; ``if TYPE_CHECKING`` does not."""
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue
        yield statement
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                yield from top_level_statements(getattr(statement, field, []))


def imports_of(name: str) -> set[str]:
    """Return the modules of ours that a module imports at its top."""
    found = set()
    for statement in top_level_statements(ast.parse(MODULES[name].read_text()).body):
        if isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{name} imports relatively"
            places = [f"{statement.module}.{alias.name}" for alias in statement.names]
        elif isinstance(statement, ast.Import):
            places = [alias.name for alias in statement.names]
        else:
            continue
        for place in places:
            package, _, rest = place.partition(".")
            if package == "msfp_cli":
                names = rest.split(".")
                longest = next((".".join(names[:n]) for n in (2, 1) if ".".join(names[:n]) in MODULES), "__init__")
                found.add(longest)
    return found - {name}


def floor(name: str) -> int:
    return FLOOR_OF[name.split(".")[0]]


def test_the_walk_sees_the_imports_it_is_to_judge() -> None:
    assert imports_of("layers") == {
        "formats",
        "kernels",
        "kernels.kernel",
        "kernels.lookup",
        "kernels.simulated",
        "packing",
        "parameters",
        "rounding",
        "routing",
    }
    assert imports_of("kernels.simulated") == {"kernels.kernel", "rounding"}
    assert imports_of("export") >= {"__init__", "calibration", "quantizer"}
    assert imports_of("commands") >= {"commands.calibrate", "commands.console"}
    assert imports_of("__main__") == {"commands"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_only_go_down(name: str) -> None:
    for imported in imports_of(name):
        assert floor(imported) <= floor(name), f"{name} imports {imported}, which stands above it"


def test_imports_form_no_circle() -> None:
    order = list(TopologicalSorter({name: imports_of(name) for name in MODULES}).static_order())
    assert len(order) == len(MODULES)


def test_no_module_is_a_drawer() -> None:
    assert not {"utils", "helpers", "common", "misc"} & {part for name in MODULES for part in name.split(".")}


def test_package_and_commands_import_no_heavy_library() -> None:
    heavy = run_python(
        "import sys, msfp_cli, msfp_cli.commands\n"
        "print(*{'torch', 'diffusers', 'transformers', 'numpy', 'accelerate'} & sys.modules.keys())"
    )
    assert heavy == ""


@pytest.mark.parametrize("name", NO_TORCH)
def test_plain_modules_import_no_torch(name: str) -> None:
    assert run_python(f"import sys, msfp_cli.{name}\nprint('torch' in sys.modules)") == "False"


def test_every_public_name_is_at_home() -> None:
    homes = {name: module for module, names in msfp_cli._HOMES.items() for name in names}
    assert sorted(homes) == sorted(msfp_cli.__all__)
    assert len(set(msfp_cli.__all__)) == len(msfp_cli.__all__)
    for name, module in homes.items():
        assert getattr(msfp_cli, name) is getattr(import_module(f"msfp_cli.{module}"), name)


def test_public_names_are_those_that_type_checkers_see() -> None:
    checking = [
        statement
        for statement in ast.parse(MODULES["__init__"].read_text()).body
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
    ]
    seen = {
        (alias.name, str(statement.module).removeprefix("msfp_cli."))
        for block in checking
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == {(name, module) for module, names in msfp_cli._HOMES.items() for name in names}


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'quantise'"):
        _ = msfp_cli.quantise


@pytest.mark.parametrize(
    "imports", ["import msfp_cli; from diffusers import DiffusionPipeline", "import msfp_cli.quantizer"]
)
def test_diffusers_imported_later_knows_our_format(imports: str) -> None:
    printed = run_python(
        f"{imports}\n"
        "from diffusers.quantizers import auto\n"
        "print(auto.AUTO_QUANTIZER_MAPPING['msfp'].__name__, auto.AUTO_QUANTIZATION_CONFIG_MAPPING['msfp'].__name__)"
    )
    assert printed == "MSFPQuantizer MSFPConfig"


def test_diffusers_imported_first_learns_our_format_and_keeps_its_own() -> None:
    printed = run_python(
        "from diffusers.quantizers import auto\n"
        "tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)\n"
        "before = [dict(table) for table in tables]\n"
        "import msfp_cli\n"
        "ours = [table.pop('msfp').__name__ for table in tables]\n"
        "print(*ours, [dict(table) for table in tables] == before)"
    )
    assert printed == "MSFPQuantizer MSFPConfig True"
