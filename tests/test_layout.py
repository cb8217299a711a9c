"""The repository keeps its folders at top level but installs one import package, light to import."""

from __future__ import annotations

import ast
import graphlib
import itertools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from comask.cli.main import MODULES

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "tensorrt", "cv2", "PIL", "pycocotools")


def test_every_package_is_listed() -> None:
    found = set()
    for name, folder in SETUPTOOLS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    assert found == set(SETUPTOOLS["packages"])


@pytest.mark.parametrize("folder", sorted(SETUPTOOLS["package-dir"].values()))
def test_no_module_is_named_like_a_dependency(folder: str) -> None:
    taken = (
        set(sys.stdlib_module_names)
        | set(HEAVY)
        | {"numpy", "click", "rich", "safetensors", "jinja2"}
    )
    clash = {path.stem for path in (ROOT / folder).rglob("*.py")} & taken
    assert not clash, f"{folder}/: rename {sorted(clash)} (they shadow a dependency)"


@pytest.mark.parametrize(
    "module",
    ["comask", "comask.runtime", "comask.export", "comask.calib", "comask.bundle"]
    + [f"comask.cli.{module}" for module in ("main", *MODULES.values())],
)
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


# Makes the imports of everything but numpy and the standard library fail, as where nothing else is.
WITH_NUMPY_ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {absent!r} else find_spec(name, *rest)
from comask.errors import BackendUnavailableError
from comask.runtime import Predictor
for backend in ("torch", "onnxruntime", "auto"):
    try:
        Predictor.load({bundle!r}, backend)
    except BackendUnavailableError as error:
        print(backend, error)
"""


def test_runtime_imports_with_numpy_alone_and_says_what_is_missing(micro_bundle: Path) -> None:
    absent = (*HEAVY, "click", "rich", "safetensors", "matplotlib", "jinja2")
    code = WITH_NUMPY_ALONE.format(absent=absent, bundle=str(micro_bundle))
    out = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    lines = out.stdout.splitlines()
    assert len(lines) == 3, out.stdout + out.stderr
    assert "pip install 'comask[train]'" in lines[0]
    assert "pip install 'comask[ort]'" in lines[1]
    assert lines[2].startswith("auto no backend runs here; ")
    assert "pip install 'comask[ort]'" in lines[2]


def test_sizes_of_files_and_functions() -> None:
    for folder in SETUPTOOLS["package-dir"].values():
        for path in itertools.chain.from_iterable(
            (ROOT / folder).rglob(f"*.{suffix}") for suffix in ("py", "jinja", "js")
        ):
            assert len(path.read_text().splitlines()) <= 400, path


# What each room may import besides itself; docs/architecture.md says why.
MAY_IMPORT = {
    "core": {"data", "kernels"},
    "data": {"core"},
    "kernels": {"core"},
    "models": {"core", "kernels"},
    "runtime": {"core", "data", "kernels", "models"},
    "training": {"core", "data", "models", "runtime"},
    "export": {"core", "kernels", "models", "runtime", "training"},
    "calib": {"core", "data", "runtime"},
    "cli": {"core", "data", "runtime", "training", "export", "calib"},
}


def imports() -> dict[str, set[str]]:
    """The modules of comask that each one imports, wherever in it, and for types alone as well."""
    files = {
        ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): path
        for package, folder in SETUPTOOLS["package-dir"].items()
        for path in (ROOT / folder).rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module] = names & files.keys() - {module}
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "core"


def test_rooms_import_downwards_alone() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room(other) != room(module) and room(other) not in MAY_IMPORT[room(module)]
    ]
    assert not wrong


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        tuple(graphlib.TopologicalSorter(imports()).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
