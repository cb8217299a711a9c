"""The public interface changes on purpose alone: docs/compatibility.md says what may change when."""

from __future__ import annotations

import ast
import difflib
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import COMMANDS, run
from public_api import command_line, public, python_interface, shape
from video_clips import make_clip, pictures

import comask
import comask.models.nms
import comask.models.roi_align
from comask.bundle import STAGES
from comask.errors import ComaskError
from comask.evaluate import METRICS

Frozen = Callable[[str, str], None]
ROOT = Path(__file__).resolve().parents[1]
FROZEN = Path(__file__).parent / "api"
# What our own pages and examples use though it is not promised: tools of this repository, and a stream of
# which docs/embedding.md says who else gives one.
UNPROMISED = {
    "comask.data.shapes.ShapesSource": "examples/contact_sheet.py",
    "comask.training.record.read_evaluations": "examples/reproduce_tables.py",
    "comask.runtime.device.open_device": "examples/pynvvideocodec_pipeline.py",
}
MEASURED_WITH = re.compile(
    r"machine\.|model\.|preprocess\."
)  # a machine, and settings (python.txt)


@pytest.fixture(scope="module")
def frozen(request: pytest.FixtureRequest) -> Frozen:
    """Compares a text with the file that holds it frozen, or writes it there with --write-api."""

    def compare(name: str, found: str) -> None:
        file = FROZEN / name
        if request.config.getoption("--write-api"):
            file.write_text(found)
        expected = file.read_text().splitlines()
        changes = [
            line
            for line in difflib.unified_diff(expected, found.splitlines(), n=0, lineterm="")
            if not line.startswith(("---", "+++", "@@"))
        ]
        breaking = any(line.startswith("-") for line in changes)
        kind = "removes or changes what is public" if breaking else "adds to what is public"
        assert not changes, (
            f"this {kind}; docs/compatibility.md says which version that takes, and what comes first. "
            f"If it is meant: `make api` writes tests/api/{name} anew, and CHANGELOG.md names it.\n"
            + "\n".join(changes)
        )

    return compare


def test_python_interface_is_frozen(frozen: Frozen) -> None:
    frozen("python.txt", python_interface())


def test_command_line_is_frozen(frozen: Frozen) -> None:
    frozen("command_line.txt", command_line(COMMANDS))


def test_files_are_frozen(micro_bundle: Path, tmp_path: Path, frozen: Frozen) -> None:
    data, results = tmp_path / "data", tmp_path / "results"
    assert run("shapes", data, "--count", 2, "--seed", 11).exit_code == 0
    clip = make_clip(tmp_path / "clip.mp4", pictures(2), audio=None)
    no_image = data / "annotations" / "instances.json"  # to have a failure reported
    backends = ("--backend", "torch", "--backend", "onnxruntime", "--device", "cpu")
    infer = ("infer", "--output", results, "--device", "cpu", "--backend", "onnxruntime")
    calls: dict[str, tuple[object, ...]] = {
        "comask infer --json of images": (
            *infer, data / "images", no_image, "--save", "overlay,masks,coco,labels",
        ),
        "comask infer --json of videos": (*infer, clip),
        "comask eval --json": ("eval", "--data", data, "--no-record", *backends),
        "comask bench --json": ("bench", "--runs", 1, "--warmup", 1, "--no-record", *backends),
        "comask doctor --json": ("doctor",),
    }  # fmt: skip
    written: dict[str, list[Any]] = {}
    told = tmp_path / "told.json"
    for name, (command, *arguments) in calls.items():
        done = run(str(command), micro_bundle, *arguments, "--json", told)
        assert told.exists(), done.output
        written[name] = [json.loads(told.read_text())]
        told.unlink()
    for file in (results / "detections.json", results / "images.json", results / "clip.mp4.jsonl"):
        text = file.read_text()
        lines = text.splitlines() if file.suffix == ".jsonl" else [text]
        written[file.name] = [json.loads(line) for line in lines]
    manifest = json.loads((micro_bundle / "manifest.json").read_text())
    written["manifest.json"] = [manifest]
    names = {category["name"]: "<class>" for category in manifest["categories"]}
    names |= dict.fromkeys(METRICS, "<metric>") | dict.fromkeys(
        ("torch", "onnxruntime"), "<backend>"
    )
    listed = {name: sorted(_lines(values, names)) for name, values in written.items()}
    listed["labels.txt"] = [f"{len(_labels(results)[0])} columns, separated by tabs"]
    listed["files of an image and of a video"] = sorted(
        {re.sub(r"^\w+\.png", "image.png", file.name) for file in results.iterdir()}
    )
    frozen("files.txt", _sections(listed))


def _lines(values: list[Any], names: dict[str, str]) -> Iterator[str]:
    for line in shape(values, names):
        line = line.removeprefix("[]").removeprefix(".")
        if not MEASURED_WITH.match(line):
            # what memory was measured depends on the machine and its load
            yield re.sub(r"_bytes: \w+$", "_bytes: number or null", line)


def _labels(results: Path) -> list[list[str]]:
    text = "".join(file.read_text() for file in sorted(results.glob("*.labels.txt")))
    return [line.split("\t") for line in text.splitlines()]


def test_graphs_and_operators_are_frozen(micro_bundle: Path, frozen: Frozen) -> None:
    manifest = json.loads((micro_bundle / "manifest.json").read_text())
    listed: dict[str, list[str]] = {}
    for stage, name in STAGES.items():
        for side in ("inputs", "outputs"):
            tensors = manifest["graphs"][stage][side]
            listed[f"{stage}: {side}"] = [
                f"{t['name']}: {t['dtype']}, {len(t['shape'])} dimensions" for t in tensors
            ]
        model = onnx.load(micro_bundle / f"{name}.onnx")
        nodes = {node.op_type: node for node in model.graph.node if node.domain == "comask"}
        listed[f"{stage}: operators of the domain comask"] = [
            f"{kind}: {len(node.input)} inputs; {', '.join(sorted(a.name for a in node.attribute))}"
            for kind, node in sorted(nodes.items())
        ]
    listed["torch"] = [
        str(getattr(torch.ops.comask, name).default._schema)
        for name in ("pyramid_roi_align", "sorted_nms")
    ]
    frozen("graphs.txt", _sections(listed))


def _sections(listed: dict[str, list[str]]) -> str:
    return "\n".join(f"[{name}]\n" + "\n".join(lines) + "\n" for name, lines in listed.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_exit_codes(name: str, tmp_path: Path) -> None:
    assert run(name, "--help").exit_code == 0
    assert run(name, "--no-such-option").exit_code == 2
    nowhere = tmp_path / "file" / "folder"
    nowhere.parent.write_text("in the way")
    arguments = {
        "train": ("--data", nowhere, "--output", tmp_path / "run"),
        "infer": (nowhere, nowhere, "--output", tmp_path / "results"),
        "eval": (nowhere, "--data", "shapes"),
        "export": (nowhere, "--output", tmp_path / "bundle"),
        "quantize": (nowhere, "--calib-data", "shapes"),
        "build": (nowhere, "--engine", "tensorrt-rtx"),
        "serve": (nowhere, "--output", tmp_path / "repository"),
        "job": (nowhere, nowhere, "--output", tmp_path / "job"),
        "sweep": (nowhere, "--data", "shapes"),
    }
    done = run(name, *arguments.get(name, (nowhere,)))
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output


def test_every_error_is_public() -> None:
    """Also where it is raised by a module that promises nothing else."""
    for module in pkgutil.walk_packages(comask.__path__, "comask."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # what is there inside of another program alone
            if error.name != "triton_python_backend_utils":
                raise
    named = {value for names in public().values() for value in names.values()}
    kinds, waiting = set(), [ComaskError]
    while waiting:
        kinds.add(kind := waiting.pop())
        waiting += [
            found for found in kind.__subclasses__() if found.__module__.startswith("comask.")
        ]
    assert kinds <= named, f"not in __all__: {kinds - named}"


def test_pages_and_examples_use_public_names() -> None:
    promised = {f"{module}.{name}" for module, names in public().items() for name in names}
    used = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        used |= {name: page for block in blocks for name in _imported(block)}
    for example in sorted((ROOT / "examples").rglob("*.py")):
        used |= {name: example for name in _imported(example.read_text())}
    unpromised = {
        name: str(file.relative_to(ROOT)) for name, file in used.items() if name not in promised
    }
    assert unpromised == UNPROMISED


def _imported(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "comask":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
