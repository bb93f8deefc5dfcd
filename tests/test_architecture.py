"""The rules of the house, read from the source: floors, sizes, environment, docstrings, kernels.

Each rule is a function from a file to a list of faults, so that the last part of this file can show
that it finds them.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).resolve().parents[1]

# An import points to a smaller number only; equals do not know each other.
FLOORS = {"formats": 0, "cuda": 0, "primitives": 1, "attention": 2, "tools": 3}

PYTHON_LINES, TEST_LINES, KERNEL_LINES, FACE_LINES = 400, 600, 300, 70

# Environment variables a floor may read; "*" is any, and handing all of them to a child process.
ENVIRONMENT = {
    "cuda": {"CUDA_HOME", "CUDA_PATH", "MIXGRAIN_CACHE_DIR", "XDG_CACHE_HOME"},
    "tools": {"*"},
}


def sources(*suffixes: str, under: tuple[str, ...] = tuple(FLOORS)) -> list[PurePath]:
    """Files of the folders named, relative to the root."""
    return sorted(
        path.relative_to(ROOT)
        for folder in under
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and path.is_file() and "__pycache__" not in path.parts
    )


# Rules


def imported(node: ast.AST) -> Iterator[str]:
    """Absolute dotted names that a statement imports; a from-import gives module.name."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value)


def import_faults(path: PurePath, text: str) -> list[str]:
    """Imports that do not point down by full name, or stay inside the floor by dot."""
    floor, faults = path.parts[0], []
    for node in ast.walk(ast.parse(text)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and node.level > len(path.parent.parts):
            faults.append(f"{where}: a relative import leaves the floor; write mixgrain.<floor>")
        for name in imported(node):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            # `import cuda.bindings` is NVIDIA's package, unless our cuda/ holds such a module.
            nvidia = top == "cuda" and not (ROOT / "cuda" / f"{target}.py").exists()
            if top in FLOORS and not nvidia:
                faults.append(f"{where}: import {name}; write mixgrain.{name}")
            elif top != "mixgrain" or target == "__version__":
                continue
            elif target == floor:
                faults.append(f"{where}: {name} is the same floor; import it by dot")
            elif target in FLOORS and FLOORS[target] >= FLOORS[floor]:
                faults.append(f"{where}: {name} is not below {floor}")
            elif target not in FLOORS and floor != "tools":
                faults.append(f"{where}: {name} is the public face; import the floor")
    return faults


def environment_faults(path: PurePath, text: str) -> list[str]:
    """Reads of environment variables outside the allow-list."""
    tree = ast.parse(text)
    parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    allowed, faults = ENVIRONMENT.get(path.parts[0], set()), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names} & {"environ", "environb", "getenv"}
            faults += [f"{path}:{node.lineno}: write os.{name}" for name in sorted(names)]
        if not (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")):
            continue
        user = parent[node]
        if isinstance(user, ast.Attribute):  # os.environ.get("NAME")
            user = parent[user]
        key = user.slice if isinstance(user, ast.Subscript) else None  # os.environ["NAME"]
        if isinstance(user, ast.Call) and user.args:
            key = user.args[0]
        elif isinstance(user, ast.Compare):  # "NAME" in os.environ
            key = user.left
        variable = key.value if isinstance(key, ast.Constant) else "*"
        if "*" not in allowed and variable not in allowed:
            faults.append(f"{path}:{node.lineno}: reads {variable} from the environment")
    return faults


def documented_methods(text: str) -> frozenset[str]:
    """Names of the methods that carry a docstring in some class of this source."""
    return frozenset(
        node.name
        for owner in ast.walk(ast.parse(text))
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
    )


def docstring_faults(
    path: PurePath, text: str, inherited: frozenset[str] = frozenset()
) -> list[str]:
    """Modules and public functions, classes and methods that lack a docstring.

    A subclass may override a method without one if a class of the house says what it does.
    """
    faults = []

    def look(body: list[ast.stmt], prefix: str, derived: bool) -> None:
        for node in body:
            if isinstance(node, ast.If | ast.Try):
                look([*node.body, *node.orelse], prefix, derived)
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            decorators = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
            if node.name.startswith("_") or decorators & {"overload", "override", "setter"}:
                continue
            if not ast.get_docstring(node) and not (derived and node.name in inherited):
                faults.append(f"{path}:{node.lineno}: {prefix}{node.name} has no docstring")
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{prefix}{node.name}.", bool(node.bases))

    tree = ast.parse(text)
    if tree.body and not ast.get_docstring(tree):
        faults.append(f"{path}:1: the module has no docstring")
    look(tree.body, "", False)
    return faults


@functools.cache
def house_methods() -> frozenset[str]:
    """Names of the methods that some class of the house documents."""
    texts = [(ROOT / path).read_text() for path in sources(".py")]
    return frozenset().union(*map(documented_methods, texts))


def house_docstring_faults(path: PurePath, text: str) -> list[str]:
    """Missing docstrings, with the whole house to inherit from."""
    return docstring_faults(path, text, house_methods())


def size_faults(path: PurePath, text: str) -> list[str]:
    """A file longer than one sitting."""
    kernel = path.suffix in (".cu", ".cuh")
    limit = KERNEL_LINES if kernel else TEST_LINES if path.parts[0] == "tests" else PYTHON_LINES
    lines = text.count("\n")
    return [f"{path}: {lines} lines, at most {limit}; split it"] if lines > limit else []


def kernel_faults(path: PurePath, text: str) -> list[str]:
    """A .cu file holds one entry point, extern "C", of the file's own name."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    faults = []
    if (entries := len(re.findall(r"\b__global__\b", code))) != 1:
        faults.append(f"{path}: {entries} __global__ functions, expected 1")
    if not re.search(rf'extern\s+"C"[^{{;]*\b__global__\b[^{{;]*\b{path.stem}\s*\(', code):
        faults.append(f'{path}: no entry point extern "C" __global__ void {path.stem}(...)')
    return faults


# The house keeps them


@pytest.mark.parametrize(
    "rule",
    [import_faults, environment_faults, house_docstring_faults, size_faults],
    ids=lambda f: f.__name__,
)
def test_python_of_the_floors(rule) -> None:
    files = sources(".py")
    assert {path.parts[0] for path in files} == set(FLOORS)
    assert [fault for path in files for fault in rule(path, (ROOT / path).read_text())] == []


def test_kernels() -> None:
    assert [
        fault
        for path in sources(".cu", ".cuh", under=("cuda",))
        for rule in (size_faults, *([kernel_faults] if path.suffix == ".cu" else []))
        for fault in rule(path, (ROOT / path).read_text())
    ] == []


def test_tests_stay_short() -> None:
    files = sources(".py", under=("tests",))
    assert [fault for path in files for fault in size_faults(path, (ROOT / path).read_text())] == []


def test_the_face_stays_small() -> None:
    assert (ROOT / "src/mixgrain/__init__.py").read_text().count("\n") <= FACE_LINES


@pytest.mark.parametrize("folder", ["", "cuda", "tests"])
def test_no_init(folder) -> None:
    """Such a file at the root or in cuda/ would hide NVIDIA's namespace package `cuda`."""
    assert not (ROOT / folder / "__init__.py").exists()
    if folder:
        assert not list((ROOT / folder).rglob("__init__.py"))


# The rules can fail

BAD_IMPORTS = {
    "up": ("formats/row.py", "from mixgrain.primitives import spmm"),
    "up, only for types": (
        "primitives/spmm.py",
        "if TYPE_CHECKING:\n    import mixgrain.attention",
    ),
    "up, inside a function": ("primitives/spmm.py", "def f():\n    from mixgrain import tools"),
    "up, by string": ("formats/row.py", "importlib.import_module('mixgrain.cuda.launch')"),
    "sideways": ("formats/row.py", "from mixgrain.cuda.launch import run"),
    "sideways, back": ("cuda/launch.py", "from mixgrain.formats import RowLayout"),
    "own floor by full name": ("formats/row.py", "from mixgrain.formats.layout import LayoutError"),
    "the second door": ("primitives/spmm.py", "from formats import RowLayout"),
    "relative across floors": ("primitives/spmm.py", "from ..formats import RowLayout"),
    "relative across floors, deep": ("primitives/plans/row.py", "from ...formats import RowLayout"),
    "the face from below": ("attention/attend.py", "import mixgrain as mg"),
    "a name of the face from below": ("attention/attend.py", "from mixgrain import spmm"),
}
GOOD_IMPORTS = {
    "down": (
        "primitives/spmm.py",
        "from mixgrain.formats import RowLayout\nimport mixgrain.cuda.x",
    ),
    "down two": ("attention/attend.py", "from mixgrain import formats"),
    "by dot": ("primitives/plans/row.py", "from ..dispatch import table\nfrom .plan import Plan"),
    "version": ("cuda/compile.py", "from mixgrain import __version__"),
    "NVIDIA's cuda": ("cuda/compile.py", "from cuda.bindings import nvrtc\nimport cuda.pathfinder"),
    "the face from the tools": (
        "tools/demo.py",
        "import mixgrain as mg\nfrom mixgrain import spmm",
    ),
    "others": ("formats/row.py", "import torch.nn.functional as F\nfrom formats_of_mine import x"),
}


@pytest.mark.parametrize("path, text", BAD_IMPORTS.values(), ids=BAD_IMPORTS)
def test_import_rule_finds(path, text) -> None:
    assert len(import_faults(PurePath(path), text)) == 1


@pytest.mark.parametrize("path, text", GOOD_IMPORTS.values(), ids=GOOD_IMPORTS)
def test_import_rule_allows(path, text) -> None:
    assert import_faults(PurePath(path), text) == []


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos.environ['HOME']",
        "import os\nos.environ.get('HOME', '')",
        "import os\nos.getenv('HOME')",
        "import os\n'HOME' in os.environ",
        "import os\nchild = {**os.environ}",
        "import os\nos.environ.get(name)",
        "from os import environ",
    ],
)
def test_environment_rule_finds(text) -> None:
    assert len(environment_faults(PurePath("cuda/compile.py"), text)) == 1


def test_environment_rule_allows_the_list() -> None:
    text = "import os\nos.environ.get('MIXGRAIN_CACHE_DIR')\n'CUDA_PATH' in os.environ"
    assert environment_faults(PurePath("cuda/compile.py"), text) == []
    assert len(environment_faults(PurePath("formats/row.py"), text)) == 2


def test_docstring_rule_finds() -> None:
    methods = "    def g(self): ...\n    def _h(self): ...\n"
    text = f"def f(): ...\nclass C:\n{methods}if x:\n    def k(): ...\n"
    faults = docstring_faults(PurePath("formats/row.py"), text)
    assert [fault.split()[1] for fault in faults] == ["the", "f", "C", "C.g", "k"]
    assert docstring_faults(PurePath("formats/row.py"), '"""D."""\ndef f():\n    """D."""') == []


def test_docstring_rule_lets_a_subclass_inherit() -> None:
    base = '"""D."""\nclass B:\n    """D."""\n    def f(self):\n        """D."""\n'
    own = '"""D."""\nclass C(B):\n    """D."""\n    def f(self): ...\n    def g(self): ...\n'
    faults = docstring_faults(PurePath("formats/row.py"), own, documented_methods(base))
    assert [fault.split()[1] for fault in faults] == ["C.g"]
    alone = own.replace("(B)", "")
    assert len(docstring_faults(PurePath("formats/row.py"), alone, documented_methods(base))) == 2


@pytest.mark.parametrize(
    "path, limit", [("formats/row.py", 400), ("tests/test_x.py", 600), ("cuda/kernels/k.cu", 300)]
)
def test_size_rule_finds(path, limit) -> None:
    assert size_faults(PurePath(path), "\n" * limit) == []
    assert len(size_faults(PurePath(path), "\n" * (limit + 1))) == 1


def test_kernel_rule_finds() -> None:
    path = PurePath("cuda/kernels/spmm_row.cu")
    good = """// extern "C" __global__ of this file
extern "C" __global__ void __launch_bounds__(128) spmm_row(int n) {}
"""
    assert kernel_faults(path, good) == []
    assert len(kernel_faults(path, good.replace("spmm_row", "spmm_rows"))) == 1
    assert len(kernel_faults(path, good.replace('extern "C"', ""))) == 1
    assert len(kernel_faults(path, good + "__global__ void other() {}")) == 1
