"""What a bundle's manifest refuses, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run

from comask.bundle import MANIFEST, Manifest
from comask.errors import BundleError

MISSING = object()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("preprocess", MISSING, "preprocess: is missing"),
        ("preprocess", [1], "preprocess: expected an object, got [1]"),
        ("model", None, "model: expected an object, got None"),
        ("categories", 3, "categories: expected a list"),
        ("categories", [7], "categories[0]: expected an object, got 7"),
        ("categories", [{"id": 1}], "categories[0].name: is missing"),
        (
            "categories",
            [{"id": 1.5, "name": "a"}],
            "categories[0].id: expected an integer or a string, got 1.5",
        ),
        ("mask_threshold", "half", "mask_threshold: expected a value of type float, got 'half'"),
        ("precisions", "fp32", "precisions: expected a list"),
        ("precisions", [32], "precisions[0]: expected a value of type str, got 32"),
        ("graphs", [], "graphs: expected an object"),
        ("files", {"a.onnx": 1}, "files.a.onnx: expected a value of type str, got 1"),
        ("parity", 3, "parity: expected a list, got 3"),
        ("parity", [3], "parity[0]: expected an object, got 3"),
        ("verification", {"fp16": True}, "verification.fp16: expected an object, got True"),
        ("latency", 3, "latency: expected an object, got 3"),
        ("latency", {"torch": 1.5}, "latency.torch: expected an object, got 1.5"),
        ("created", 2026, "created: expected a value of type str, got 2026"),
        ("paritty", [], "unknown setting paritty: did you mean parity?"),
        ("files", list(range(10**4)), "files: expected an object, got [0, 1, 2"),
    ],
)
def test_wrong_fields_are_named(micro_bundle: Path, field: str, value: object, words: str) -> None:
    content = json.loads((micro_bundle / MANIFEST).read_text()) | {field: value}
    content = {name: found for name, found in content.items() if found is not MISSING}
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(content))
    assert f"is not a comask manifest: {words}" in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not a comask manifest: it is not JSON: "),
        ("[]", "is not a comask manifest: expected a JSON object with schema_version"),
        ("{}", "is not a comask manifest: expected a JSON object with schema_version"),
        ("3", "is not a comask manifest: expected a JSON object with schema_version"),
    ],
)
def test_what_is_no_manifest_at_all(text: str, words: str) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(text)
    assert words in str(caught.value)


def test_manifests_survive_json(micro_bundle: Path) -> None:
    text = (micro_bundle / MANIFEST).read_text()
    assert Manifest.from_json(text).to_json() == text


def test_commands_say_it_in_one_line(micro_bundle: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = json.loads((micro_bundle / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(content | {"parity": 3}))
    result = run("doctor", tmp_path)
    assert result.exit_code == 1
    assert "parity: expected a list, got 3" in result.output
    assert "Traceback" not in result.output
