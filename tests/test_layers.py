"""The shape of the package: imports go up the design's table, nothing is printed, pickled or caught blindly,
every public name is described.
"""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dfrot_lab

PACKAGE = Path(dfrot_lab.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS = (
    "recipe", "maths", "disk", "model", "observe", "rotate", "weights", "caches", "score", "study", "export", "show",
    "explore", "cli",
)  # fmt: skip
"""The folders of the package, lowest floor first: imports only go down."""
FLOOR = {folder: number for number, folder in enumerate(FLOORS)}

MAX_LINES = 300
MAX_FUNCTION = 40
HEAVY = ("torch", "transformers", "matplotlib", "pandas", "numpy", "scipy")


def name_of(file: Path) -> str:
    """A file's module name below the package: `model.surgery`; a folder's own for its `__init__`."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in FILES}


def imports(name: str, tree: ast.AST) -> set[str]:
    """The package's modules that the module `name` imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("dfrot_lab.") for a in node.names if a.name.startswith("dfrot_lab.")
            }
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = name.split(".")[: -node.level] if name not in FLOOR else name.split(".")
                module = ".".join(["dfrot_lab", *parts, *([module] if module else [])])
            if module.split(".")[0] == "dfrot_lab":
                own = module.removeprefix("dfrot_lab").removeprefix(".")
                inner = {f"{own}.{a.name}".strip(".") for a in node.names}
                found |= {other if other in MODULES or other in FLOOR else own for other in inner}
    return found - {"", name}


def wrong_way(name: str, tree: ast.AST) -> Iterator[str]:
    """Imports of a module from a higher floor; one of no floor counts as the highest."""
    for other in sorted(imports(name, tree)):
        if FLOOR.get(other.split(".")[0], len(FLOORS)) > FLOOR.get(name.split(".")[0], len(FLOORS)):
            yield f"{name} imports {other}"


def blind_excepts(_: str, tree: ast.AST) -> Iterator[str]:
    """`except:` with nothing named, and `except BaseException` that does not raise again."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            blind = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            if blind and not any(isinstance(part, ast.Raise) for part in ast.walk(node)):
                yield f"line {node.lineno}: except that names no error"


def prints(_: str, tree: ast.AST) -> Iterator[str]:
    """Calls of the built-in print."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"line {node.lineno}: print("


def unsafe_or_hidden(_: str, tree: ast.AST) -> Iterator[str]:
    """Pickle in any form, `sys.path`, code from a model's repository."""
    pickles = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve"}
    attributes = {
        ("torch", "load"),
        ("torch", "save"),
        ("sys", "path"),
        ("pd", "read_pickle"),
    }  # np.load takes no pickle unless it is told to, which is looked for below
    for node in ast.walk(tree):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if pickles & {name.split(".")[0] for name in names}:
            yield f"line {node.lineno}: imports {names}"
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in attributes
        ):
            yield f"line {node.lineno}: {node.value.id}.{node.attr}"
        if isinstance(node, ast.Attribute) and node.attr == "to_pickle":
            yield f"line {node.lineno}: to_pickle"
        is_said = isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle")
        if is_said and not (isinstance(node.value, ast.Constant) and node.value.value is False):
            yield f"line {node.value.lineno}: {node.arg}"


def public(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public classes and functions of a module, and the public methods of the former."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def undescribed(_: str, tree: ast.AST) -> Iterator[str]:
    """Public names without a docstring, public functions with a parameter or result without annotation."""
    if not ast.get_docstring(tree):
        yield "no module docstring"
    for node in public(tree):
        if not ast.get_docstring(node):
            yield f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            parameters = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            bare = [
                p.arg
                for p in parameters
                if p is not None and p.annotation is None and p.arg not in ("self", "cls")
            ]
            if bare or node.returns is None:
                yield f"{node.name} lacks annotations: {', '.join(bare) or 'its result'}"


BAD_SOURCE = {
    wrong_way: [
        "from ..cli import app",
        "from dfrot_lab import cli",
        "from dfrot_lab.explore import base",
        "import dfrot_lab.cli.app",
        "from dfrot_lab.cli import app",
        "def f():\n from ..cli import app",
    ],
    blind_excepts: ["try:\n pass\nexcept:\n pass", "try:\n pass\nexcept Exception:\n pass"],
    prints: ["def f():\n print(1)"],
    unsafe_or_hidden: [
        "import pickle",
        "from pickle import loads",
        "torch.load('a')",
        "sys.path.append('a')",
        "f(trust_remote_code=True)",
    ],
    undescribed: [
        "def f() -> int:\n 'x'",
        "'x'\ndef f() -> int: ...",
        "'x'\ndef f(a) -> int:\n 'x'",
        "'x'\ndef f(a: int):\n 'x'",
        "'x'\nclass A: ...",
        "'x'\nclass A:\n 'x'\n def f(self): 'x'",
    ],
}
Rule = Callable[[str, ast.AST], Iterator[str]]


@pytest.mark.parametrize(
    ("rule", "source"), [(rule, source) for rule, sources in BAD_SOURCE.items() for source in sources]
)
def test_the_rules_see_what_they_forbid(rule: Rule, source: str):
    assert list(rule("recipe.specs", ast.parse(source)))


@pytest.mark.parametrize("rule", BAD_SOURCE)
def test_the_package_keeps_the_rule(rule: Rule):
    faults = [
        f"{name}: {fault}"
        for name, file in MODULES.items()
        for fault in rule(name, ast.parse(file.read_text()))
        if name
    ]
    assert not faults, "\n".join(faults)


def test_every_folder_has_its_floor_and_the_checks_saw_the_package():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders <= set(FLOORS), "give a new folder its floor"
    loose = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not loose, f"modules live in folders; {loose} do not"
    assert {name.split(".")[0] for name in MODULES} >= {*folders}
    assert any(name.startswith("explore.") for name in MODULES)
    assert sum(len(list(public(ast.parse(file.read_text())))) for file in FILES) > 100
    assert sum(len(imports(name, ast.parse(file.read_text()))) for name, file in MODULES.items()) > 100


def test_no_import_cycle():
    graph = {name: imports(name, ast.parse(file.read_text())) for name, file in MODULES.items() if name}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("recipe.specs") < order.index("model.loading") < order.index("score.perplexity")


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short(name: str):
    text = MODULES[name].read_text()
    lines = len(text.splitlines())
    assert 0 < lines <= MAX_LINES, f"{lines} lines: split it, or say less"
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION}
    assert not long, f"functions have at most {MAX_FUNCTION} lines; got {long}"


def test_the_package_is_small():
    size = {name: len(file.read_text().splitlines()) for name, file in MODULES.items()}
    assert sum(size.values()) <= 22_400, (
        "builds, divergence, offsets; drift, clips, exports; then scales, rivals, formats, KV caches, static and "
        "grouped activations, prefixes; rows side by side; what fits take, weights by what they compute; "
        "rotations before every linear, a dial; what is inside; weights that know their layer's attention; "
        "explorers: layers as a film, views as lines; graders of four questions; a leaderboard to sort"
    )
    graders = {"explore.lesson", "explore.verdicts"}
    explorers = {name for name in size if name.startswith("explore")} - graders
    assert graders <= size.keys() and sum(size[name] for name in explorers) <= 3_500


def in_a_fresh_process(code: str) -> object:
    """The JSON that `code` prints in a process of its own."""
    return json.loads(
        subprocess.run(
            [sys.executable, "-c", f"import json, sys\n{code}"], capture_output=True, text=True, check=True
        ).stdout
    )


def test_importing_the_package_loads_nothing_heavy_and_takes_no_time():
    said = "print(json.dumps([list(sys.modules), time.perf_counter() - t]))"
    code = f"import time\nt = time.perf_counter()\nimport dfrot_lab\n{said}"
    runs = [in_a_fresh_process(code) for _ in range(3)]
    modules = set(runs[0][0])
    assert "dfrot_lab" in modules
    assert not modules & set(HEAVY)
    assert min(seconds for _, seconds in runs) < 0.3


def test_specs_load_nothing_heavy_either():
    modules = set(
        in_a_fresh_process("import dfrot_lab\ndfrot_lab.Recipe().key\nprint(json.dumps(list(sys.modules)))")
    )
    assert "dfrot_lab.recipe.specs" in modules
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("order", ["sorted(names)", "sorted(names, reverse=True)"])
def test_every_name_of_the_package_is_the_same_public_object_at_every_look(order: str):
    """A submodule takes the place of a lazy name that is spelt like it, as soon as anything imports it: at a
    second look the name has changed.
    """
    code = f"""
import types, dfrot_lab
names = dir(dfrot_lab)
looks = [[getattr(dfrot_lab, n) for n in {order}] for _ in range(2)]
module = types.ModuleType
changed = [n for n, a, b in zip({order}, *looks) if a is not b or isinstance(a, module)]
print(json.dumps([sorted(names), changed]))
"""
    names, changed = in_a_fresh_process(code)
    assert {"load_model", "Store", "ModelSpec", "token_errors", "__version__"} <= set(names)
    assert not changed


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dfrot_lab' has no attribute 'rotated'"):
        dfrot_lab.rotated  # noqa: B018
