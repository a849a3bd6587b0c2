"""Measure the shape of the source: folders, imports, functions and lines.

``python tests/structure.py`` prints the figures, and `test_structure.py` holds them as bounds, so
that the shape can only get better.
"""

import ast
import io
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "msfp_cli"

# What may be imported by whom: a package imports itself and those on the lines before its own. The
# first line is the ground.
ORDER = (
    "errors version progress files recipe processes run memory",
    "formats",
    "layers",
    "engines",
    "pipelines",
    "recording",
    "calibration",
    "finetuning",
    "checkpoint",
    "streaming",
    "evaluation",
    "report",
    "picture_files sample status demo options",
    "commands",
    "__init__ __main__",
)
FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names.split()}


def module_name(path: Path, source: Path = SOURCE) -> str:
    """Return a module's dotted name inside the package; a package's own is that of its folder."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def modules(source: Path = SOURCE) -> dict[str, Path]:
    """Return every module's file by its name."""
    return {module_name(path, source): path for path in sorted(source.rglob("*.py"))}


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of ours that a file imports: at its top, in functions, and for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            places = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            places = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            places = [str(getattr(node.args[0], "value", ""))]
        else:
            continue
        found |= {
            _longest(place, known) for place in places if place.partition(".")[0] == "msfp_cli"
        }
    return found


def _longest(place: str, known: dict[str, Path]) -> str:
    """Return the module that a dotted name lies in."""
    parts = place.split(".")[1:]
    while parts and ".".join(parts) not in known:
        parts.pop()
    return ".".join(parts) or "__init__"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(text: str) -> int:
    """Count the lines that hold code: neither empty, nor comment, nor docstring."""
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
        ):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def is_packed(node: ast.AST) -> bool:
    """Whether an assignment gives several names values of their own: ``a, b = c, d``."""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
        return False
    return isinstance(node.value, ast.Tuple | ast.GeneratorExp)


def is_nested(node: ast.AST) -> bool:
    """Whether a comprehension has a second ``for``, or another comprehension inside."""
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    if not isinstance(node, kinds):
        return False
    inside = (child for child in ast.walk(node) if child is not node)
    return len(node.generators) > 1 or any(isinstance(child, kinds) for child in inside)


def takes_options(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is a command, whose length is that of its options."""
    return "Option" in ast.unparse(function.args)


def percentile(values: list[int], share: float) -> int:
    """Return the smallest value that so large a share does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(source: Path = SOURCE) -> dict[str, float]:
    """Return every figure by its title."""
    known = modules(source)
    imports = {name: imports_of(path, known) - {name} for name, path in known.items()}
    fan_outs = [len(found) for found in imports.values()]
    texts = [path.read_text() for path in known.values()]
    trees = [ast.parse(text) for text in texts]
    lengths, long = list[int](), 0
    for tree in trees:
        for function in functions(tree):
            length = (function.end_lineno or 0) - function.lineno + 1
            lengths.append(length)
            long += length > 60 and not takes_options(function)
    thousands = sum(code_lines(text) for text in texts) / 1000
    nodes = [node for tree in trees for node in ast.walk(tree)]
    folders = Counter(path.parent for path in known.values())
    return {
        "modules": len(known),
        "modules in the largest folder": max(folders.values()),
        "own imports per module, mean": round(statistics.mean(fan_outs), 2),
        "fan-out, 90 % of modules": percentile(fan_outs, 0.9),
        "fan-out, largest": max(fan_outs),
        "imports upwards": len(upward(imports)),
        "circles": int(has_circle(imports)),
        "lines of a function, median": statistics.median(lengths),
        "lines of a function, 90 %": percentile(lengths, 0.9),
        "functions over 60 lines": long,
        "packed assignments per 1,000 lines of code": round(
            sum(map(is_packed, nodes)) / thousands, 1
        ),
        "nested comprehensions per 1,000 lines of code": round(
            sum(map(is_nested, nodes)) / thousands, 1
        ),
        "noqa and type: ignore": sum(
            len(re.findall(r"# noqa|# type: ignore", text)) for text in texts
        ),
    }


def duplicate_classes(source: Path = SOURCE) -> dict[str, list[str]]:
    """Return the names of public classes that several modules define, with the modules."""
    homes: dict[str, list[str]] = {}
    for module, path in modules(source).items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    return {name: places for name, places in homes.items() if len(places) > 1}


def upward(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return who imports whom from a package after its own."""
    pairs = [(name, other) for name, found in imports.items() for other in found]
    return [
        pair
        for pair in pairs
        if FLOOR.get(pair[1].split(".")[0], 0) > FLOOR.get(pair[0].split(".")[0], 0)
    ]


def has_circle(imports: dict[str, set[str]]) -> bool:
    """Whether modules import each other round and round."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError:
        return True
    return False


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE
    for title, value in measure(place).items():
        print(f"{value:>8}  {title}")
