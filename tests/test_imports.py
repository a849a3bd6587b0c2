import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import msfp_cli
from structure import FLOOR, has_circle, imports_of, modules, upward

SOURCE = Path(msfp_cli.__file__).parent

NO_TORCH = (
    "errors",
    "files",
    "recipe",
    "progress",
    "run",
    "version",
    "formats.float_format",
    "pipelines.conditions",
    "pipelines.loading",
    "pipelines.sampling",
    "recording.recipe",
    "calibration.keep",
    "calibration.recipe",
    "finetuning.recipe",
    "evaluation.recipe",
    "checkpoint.registration",
)


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


MODULES = modules(SOURCE)
IMPORTS = {name: imports_of(path, MODULES) - {name} for name, path in MODULES.items()}


def test_the_walk_sees_the_imports_it_is_to_judge() -> None:
    assert {"errors", "files.documents"} <= IMPORTS["run"]
    assert "checkpoint.quantizer" in IMPORTS["checkpoint.registration"]  # inside of a function
    assert IMPORTS["__main__"] == {"commands.app", "commands.console"}
    assert upward({"formats.search": {"layers.scheme", "errors"}}) == [
        ("formats.search", "layers.scheme")
    ]


def test_every_package_has_its_place() -> None:
    assert {name.split(".")[0] for name in MODULES} == FLOOR.keys()


def test_imports_only_go_down() -> None:
    assert upward(IMPORTS) == []


def test_a_circle_of_imports_would_be_seen() -> None:
    assert has_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not has_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_no_module_is_a_drawer() -> None:
    assert not {"utils", "helpers", "common", "misc"} & {
        part for name in MODULES for part in name.split(".")
    }


def test_package_and_commands_import_no_heavy_library() -> None:
    heavy = run_python(
        "import sys, msfp_cli, msfp_cli.commands.app\n"
        "print(*{'torch', 'diffusers', 'transformers', 'numpy', 'accelerate'} & sys.modules.keys())"
    )
    assert heavy == ""


@pytest.mark.parametrize("name", NO_TORCH)
def test_plain_modules_import_no_torch(name: str) -> None:
    assert run_python(f"import sys, msfp_cli.{name}\nprint('torch' in sys.modules)") == "False"


def test_every_public_name_is_at_home() -> None:
    for name, module in msfp_cli._HOME.items():
        assert getattr(msfp_cli, name) is getattr(import_module(f"msfp_cli.{module}"), name)


def test_public_names_are_those_that_type_checkers_see() -> None:
    stub = ast.parse((SOURCE / "__init__.pyi").read_text())
    public: dict[str, str] = {}
    for statement in stub.body:
        assert isinstance(statement, ast.ImportFrom)
        module = str(statement.module).removeprefix("msfp_cli.")
        public |= {alias.name: module for alias in statement.names}
    assert public == {**msfp_cli._HOME, "__version__": "version"}


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'quantise'"):
        _ = msfp_cli.quantise


@pytest.mark.parametrize(
    "imports",
    [
        "import msfp_cli; from diffusers import DiffusionPipeline",
        "import msfp_cli.checkpoint.quantizer",
    ],
)
def test_diffusers_imported_later_knows_our_format(imports: str) -> None:
    printed = run_python(
        f"{imports}\n"
        "from diffusers.quantizers import auto\n"
        "print(auto.AUTO_QUANTIZER_MAPPING['msfp'].__name__)\n"
        "print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING['msfp'].__name__)"
    )
    assert printed == "MSFPQuantizer\nMSFPConfig"


@pytest.mark.parametrize("first", ["msfp_cli", "diffusers.quantizers.auto", "transformers"])
def test_transformers_knows_our_format_whatever_is_imported_first(first: str) -> None:
    printed = run_python(
        f"import {first}\n"
        "import msfp_cli\n"
        "from transformers.quantizers import auto\n"
        "print(auto.AUTO_QUANTIZER_MAPPING['msfp'].__name__)\n"
        "print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING['msfp'].__name__)"
    )
    assert printed == "MSFPTextQuantizer\nMSFPConfig"


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
