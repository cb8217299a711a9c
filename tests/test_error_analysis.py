"""What is wrong with a model: figures against plain loops and pycocotools' matches, pages, commands."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import error_scenes
import numpy as np
import pytest
import torch
from conftest import run, write_own_truth
from error_scenes import CATEGORIES, Scene, coco_scorer, judged, kind_of, random_scene
from evaluated import edit_manifest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from comask.bundle import DEFAULT_THRESHOLD, Bundle, ScoreThresholds
from comask.data.source import Category
from comask.error_analysis import ErrorAnalysis, analyse
from comask.error_matching import KINDS
from comask.error_pictures import FRAME, GAP, worst_pictures
from comask.error_section import SHOWN, error_section
from comask.errors import BundleError
from comask.evaluate import TASKS
from comask.page import render
from comask.training import validation
from comask.training.checkpoint import load_checkpoint, model_from_checkpoint
from comask.training.distributed import Ranks
from comask.training.record import Analysis, RunRecord, read_analysis
from comask.training.validation import Validator

scenes = st.builds(random_scene, seeds, st.integers(1, 4))
tasks = st.sampled_from(TASKS)


def listed(scene: Scene, task: str, name: str | None) -> list[tuple[float, bool]]:
    """(score, right) of the detections of a class, or of all, that are not ignored."""
    ids = {category.id for category in scene.categories if name in (None, category.name)}
    return [
        (row["score"], judge.found[i] is not None)
        for judge, rows in zip(judged(scene, task), scene.results, strict=True)
        for i, row in enumerate(rows)
        if row["category_id"] in ids and not judge.ignored[i]
    ]


def counted(scene: Scene, name: str | None) -> int:
    ids = {category.id for category in scene.categories if name in (None, category.name)}
    return sum(
        thing["category_id"] in ids and not thing["iscrowd"]
        for objects in scene.objects
        for thing in objects
    )


def at(found: list[tuple[float, bool]], objects: int, threshold: float) -> tuple[float, ...]:
    """Precision, recall and F1, -1 where they are undefined."""
    kept = [right for score, right in found if score >= threshold]
    hits = sum(kept)
    precision = hits / len(kept) if kept else -1.0
    if not objects:
        return precision, -1.0, -1.0
    return precision, hits / objects, 2 * hits / (len(kept) + objects)


@given(scenes, tasks)
def test_precision_recall_and_f1_are_those_of_plain_loops(scene: Scene, task: str) -> None:
    errors = analyse(scene.truth, scene.results).tasks[task]
    figures = [(None, errors.overall), *((c.name, c) for c in errors.classes)]
    for name, figure in figures:
        found, objects = listed(scene, task, name), counted(scene, name)
        assert (figure.detections, figure.objects) == (len(found), objects)
        for i in range(101):
            curve = figure.curve
            mine = curve.precision[i], curve.recall[i], curve.f1[i]
            assert mine == pytest.approx(at(found, objects, i / 100), abs=1e-12)
        here = figure.precision, figure.recall, figure.f1
        assert here == pytest.approx(at(found, objects, figure.threshold), abs=1e-12)
        assert figure.fitted == (objects > 0 and any(right for _, right in found))
        if figure.fitted:
            # the largest F1, and of several thresholds the highest
            assert figure.threshold == max(
                (score for score, _ in found), key=lambda t: (at(found, objects, t)[2], t)
            )
        else:
            assert figure.threshold == DEFAULT_THRESHOLD


@given(scenes, tasks)
def test_ap50_and_its_curve_are_those_of_pycocotools(scene: Scene, task: str) -> None:
    errors = analyse(scene.truth, scene.results).tasks[task]
    precision = coco_scorer(scene, task).eval["precision"]
    for label, figure in enumerate(errors.classes):
        assert figure.curve.interpolated == pytest.approx(precision[0, :, label, 0, 0])
        assert figure.ap50 == pytest.approx(np.mean(precision[0, :, label, 0, 0]))
    assert errors.ap50 == pytest.approx(error_scenes.ap50(scene, task))
    assert errors.overall.ap50 == pytest.approx(errors.ap50)
    assert np.mean(errors.overall.curve.interpolated) == pytest.approx(errors.ap50)


@given(scenes, tasks)
def test_confusion_is_that_of_plain_loops_and_adds_up(scene: Scene, task: str) -> None:
    errors = analyse(scene.truth, scene.results).tasks[task]
    thresholds = [figure.threshold for figure in errors.classes]
    assert errors.confusion == error_scenes.confusion(scene, task, thresholds)
    matrix = np.array(errors.confusion)
    assert matrix[-1, -1] == 0
    for label, figure in enumerate(errors.classes):
        found = listed(scene, task, figure.name)
        kept = [right for score, right in found if score >= figure.threshold]
        assert matrix[label].sum() == figure.objects
        assert matrix[:, label].sum() == len(kept)
        assert matrix[label, label] == sum(kept)


@given(scenes, tasks)
def test_kinds_of_error_are_those_of_plain_loops(scene: Scene, task: str) -> None:
    errors = analyse(scene.truth, scene.results).tasks[task]
    thresholds = {c.id: f.threshold for c, f in zip(CATEGORIES, errors.classes, strict=True)}
    total, shown = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    per_image = []
    for image, judge in enumerate(judged(scene, task)):
        here = dict.fromkeys(KINDS, 0)
        covered, covered_here = set(), set()
        for i, row in enumerate(scene.results[image]):
            kind, meant = kind_of(scene, image, judge, i)
            kept = row["score"] >= thresholds[row["category_id"]]
            if kind in KINDS:
                total[kind] += 1
                here[kind] += kept
            covered |= {meant, judge.found[i]}
            covered_here |= {meant, judge.found[i]} if kept else set()
        for j, thing in enumerate(scene.objects[image]):
            if not thing["iscrowd"]:
                total["missed"] += j not in covered
                here["missed"] += j not in covered_here
        shown = {name: shown[name] + here[name] for name in KINDS}
        per_image.append(here)
    assert {name: kind.count for name, kind in errors.kinds.items()} == total
    assert {name: kind.at_thresholds for name, kind in errors.kinds.items()} == shown
    worst = sorted(range(len(scene)), key=lambda i: -sum(per_image[i].values()))
    assert [image.place for image in errors.worst] == [
        i for i in worst if any(per_image[i].values())
    ]
    for image in errors.worst:
        assert image.kinds == per_image[image.place]
        assert len(image.wrong) == sum(n for kind, n in image.kinds.items() if kind != "missed")


@given(scenes, tasks)
def test_fixing_a_kind_gains_what_the_fixed_results_score(scene: Scene, task: str) -> None:
    errors = analyse(scene.truth, scene.results).tasks[task]
    for name, kind in errors.kinds.items():
        after = error_scenes.ap50(error_scenes.fixed(scene, task, name), task)
        if min(after, errors.ap50) < 0:
            assert kind.gain == -1
        else:
            assert kind.gain == pytest.approx(after - errors.ap50, abs=1e-12), name
            assert kind.gain >= -1e-12


def one_of_each() -> Scene:
    """Each kind of error once, beside one right detection of each class."""
    scene = Scene()
    scene.add_image()
    for label, x in enumerate((0, 50, 100)):
        scene.add_object(label, (x, 0, 40, 40))
        scene.add_result(label, (x, 0, 40, 40), 0.8)
    scene.add_result(0, (2, 0, 40, 40), 0.7)  # duplicate
    scene.add_object(0, (0, 60, 40, 40))
    scene.add_result(1, (0, 60, 40, 40), 0.9)  # of another class
    scene.add_object(1, (60, 60, 40, 40))
    scene.add_result(1, (60, 80, 40, 40), 0.95)  # IoU 1/3
    scene.add_result(2, (66, 10, 30, 40), 0.85)  # of another class, IoU about 1/3: both
    scene.add_result(2, (160, 160, 30, 30), 0.9)  # nothing is here
    scene.add_object(2, (120, 60, 40, 40))  # missed
    return scene


def test_each_kind_once() -> None:
    scene = one_of_each()
    for errors in analyse(scene.truth, scene.results).tasks.values():
        assert {name: kind.count for name, kind in errors.kinds.items()} == dict.fromkeys(KINDS, 1)


# What puts each kind right by hand: the numbers of the results that go, or what they become.
BY_HAND: dict[str, dict[int, dict[str, Any] | None]] = {
    "duplicate": {3: None},
    "classification": {4: {"category_id": CATEGORIES[0].id}},
    "localization": {
        5: {"bbox": [60, 60, 40, 40], "segmentation": error_scenes.rectangle((60, 60, 40, 40))}
    },
    "both": {6: None},
    "background": {7: None},
    "missed": {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_each_kind_put_right_by_hand(kind: str, task: str) -> None:
    scene = one_of_each()
    errors = analyse(scene.truth, scene.results).tasks[task]
    for place, change in sorted(BY_HAND[kind].items(), reverse=True):
        if change is None:
            del scene.results[0][place]
        else:
            scene.results[0][place] |= change
    if kind == "missed":
        del scene.objects[0][-1]
    after = error_scenes.ap50(scene, task)
    assert errors.kinds[kind].gain == pytest.approx(after - errors.ap50, abs=1e-12)
    assert errors.kinds[kind].gain > 0.01 or kind == "duplicate"


def test_crowds_and_unknown_classes_count_for_nothing() -> None:
    scene = one_of_each()
    before = analyse(scene.truth, scene.results)
    scene.add_object(0, (150, 0, 50, 150), crowd=True)
    for y in (10, 60):
        scene.add_result(0, (160, y, 20, 30), 0.99)  # in the crowd
    scene.results[0].append(scene.results[0][0] | {"category_id": "unicorn"})
    assert analyse(scene.truth, scene.results) == before
    scene.add_result(1, (160, 10, 20, 30), 0.99)  # of another class than the crowd
    after = analyse(scene.truth, scene.results).tasks["segm"]
    assert after.kinds["background"].count == 2


def test_detections_of_equal_scores_are_kept_together() -> None:
    scene = Scene()
    scene.add_image()
    for x in (0, 50, 100):
        scene.add_object(0, (x, 0, 40, 40))
    scene.add_result(0, (0, 0, 40, 40), 0.9)
    scene.add_result(0, (50, 0, 40, 40), 0.5)  # right, and four wrong ones of the same score
    for y in (50, 75, 100, 125):
        scene.add_result(0, (0, y, 20, 20), 0.5)
    figure = analyse(scene.truth, scene.results).tasks["segm"].classes[0]
    assert figure.threshold == 0.9
    assert figure.f1 == 2 * 1 / (1 + 3)


def test_of_objects_that_overlap_alike_coco_takes_the_last() -> None:
    scene = Scene()
    scene.add_image()
    for x in (0, 4):
        scene.add_object(0, (x, 0, 40, 40))
    scene.add_result(0, (2, 0, 40, 40), 0.9)
    scene.add_result(0, (0, 0, 22, 40), 0.8)  # fits the first object alone
    errors = analyse(scene.truth, scene.results).tasks["segm"]
    assert errors.ap50 == error_scenes.ap50(scene, "segm") == 1


def test_a_wrong_detection_is_taken_for_the_object_that_it_overlaps_most() -> None:
    scene = Scene()
    scene.add_image()
    scene.add_object(0, (0, 0, 40, 36))
    scene.add_object(1, (0, 0, 40, 38))
    scene.add_result(2, (0, 0, 40, 40), 0.9)
    scene.add_object(2, (150, 150, 40, 40))
    scene.add_result(2, (150, 150, 40, 40), 0.8)  # so that both are above the threshold
    errors = analyse(scene.truth, scene.results).tasks["segm"]
    assert errors.confusion == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert errors.worst[0].not_found == [0, 1]
    assert {kind for kind, n in errors.worst[0].kinds.items() if n} == {"classification", "missed"}


def test_nothing_found_and_nothing_there() -> None:
    scene = Scene()
    scene.add_image()
    nothing = analyse(scene.truth, scene.results).tasks["segm"]
    assert nothing.ap50 == nothing.overall.f1 == nothing.classes[0].recall == -1
    assert {kind.gain for kind in nothing.kinds.values()} == {-1}
    assert nothing.worst == []
    assert nothing.thresholds == {}
    scene.add_object(0, (0, 0, 40, 40))
    scene.add_result(1, (100, 100, 40, 40), 0.9)
    errors = analyse(scene.truth, scene.results).tasks["segm"]
    assert errors.ap50 == 0
    assert errors.kinds["missed"].gain == -1  # nothing is left to score
    assert errors.confusion == [[0, 0, 0, 1], [0] * 4, [0] * 4, [0, 1, 0, 0]]
    assert [c.threshold for c in errors.classes] == [DEFAULT_THRESHOLD] * 3
    with pytest.raises(ValueError, match="zip"):
        analyse(scene.truth, [])


def test_ids_are_names_and_images_keep_their_places() -> None:
    scene = random_scene(5, 4)
    some = scene.truth.of([2, 0])
    part = analyse(some, [scene.results[2], scene.results[0]]).tasks["segm"]
    alone = [analyse(scene.truth.of([i]), [scene.results[i]]).tasks["segm"].overall for i in (2, 0)]
    assert part.overall.objects == sum(figure.objects for figure in alone)
    assert part.overall.detections == sum(figure.detections for figure in alone)
    assert {image.file for image in part.worst} <= {"3.png", "1.png"}
    for image in part.worst:
        assert image.file == f"{(2, 0)[image.place] + 1}.png"


class Page(HTMLParser):
    """The tables, charts and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.paths: list[dict[str, str]] = []
        self.images: list[str] = []
        self.text, self._cell = "", False
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self._cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self._cell:
            self.rows[-1].append("")
        elif tag == "path":
            self.paths.append(values)
        elif tag == "img":
            self.images.append(values["alt"])

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data.strip()

    def row(self, first: str, *, after: str = "error") -> list[str]:
        """The first row that begins so, of the tables from the one with the head `after` on."""
        start = next(i for i, row in enumerate(self.rows) if after in row)
        return next(row for row in self.rows[start:] if row[:1] == [first])


def page_of(analysis: ErrorAnalysis, folder: Path, pictures: Any = ()) -> Page:
    template = folder / "page.html.jinja"
    template.write_text(
        '{% extends "page.html.jinja" %}{% from "error_section.html.jinja" import error_section %}'
        "{% block body %}{{ error_section(errors, title) }}{% endblock %}"
    )
    template = template.rename(folder / "whole.html.jinja")
    shown = error_section(analysis, pictures)
    return Page(render(template, title="Errors", errors=shown).decode())


def points(value: float, form: str = ".1f") -> str:
    return f"{100 * value:{form}}" if value >= 0 else "n/a"


@pytest.mark.parametrize("seed", [3, 4])
def test_pages_hold_the_figures(tmp_path: Path, seed: int) -> None:
    scene = random_scene(seed, 12)
    analysis = analyse(scene.truth, scene.results)
    masks, boxes = analysis.tasks["segm"], analysis.tasks["bbox"]
    page = page_of(analysis, tmp_path, worst_pictures(masks, scene.truth, scene.results))
    for name, kind in masks.kinds.items():
        box = boxes.kinds[name]
        assert page.row(name) == [
            name, points(kind.gain, ".2f"), f"{kind.at_thresholds}", f"{kind.count}",
            points(box.gain, ".2f"), f"{box.at_thresholds}",
        ]  # fmt: skip
    for figure, counts in zip(masks.classes, masks.confusion, strict=False):
        assert page.row(figure.name, after="<cow>") == [figure.name, *map(str, counts)]
    assert page.row("background", after="<cow>") == ["background", *map(str, masks.confusion[-1])]
    for figure, box in zip(masks.classes, boxes.classes, strict=True):
        shown = [f"{f.threshold:.3f}" if f.fitted else "(0.5)" for f in (figure, box)]
        assert page.row(figure.name, after="threshold") == [
            figure.name, f"{figure.objects}", points(figure.ap50), shown[0],
            points(figure.precision), points(figure.recall), points(figure.f1), shown[1],
            points(box.f1),
        ]  # fmt: skip
    assert ("no threshold could be measured" in page.text) == (
        not all(c.fitted for c in masks.classes)
    )
    assert [alt.partition(":")[0] for alt in page.images] == [image.file for image in masks.worst]
    # the first charts are those of all classes
    for name in ("precision", "recall", "f1", "interpolated"):
        drawn = next(path["d"] for path in page.paths if path.get("class") == name)
        numbers = [part.split() for part in drawn.replace("M", "L").split("L")[1:]]
        values = getattr(masks.overall.curve, name)
        known = [(x, 100 * y) for x, y in enumerate(values) if y >= 0]
        assert [int(x) for x, _ in numbers] == [x for x, _ in known]
        assert [float(y) for _, y in numbers] == pytest.approx([y for _, y in known], abs=0.05)


def test_of_many_classes_the_most_confused_are_shown(tmp_path: Path) -> None:
    count = SHOWN + 5
    scene = Scene(categories=tuple(Category(id=k, name=f"class {k}") for k in range(count)))
    scene.add_image()
    for k in range(count):
        box = (10.0 * (k % 20), 10.0 * (k // 20), 9.0, 9.0)
        scene.add_object(k, box)
        # the last two are taken for each other, a third for a class that is not shown
        label = {count - 1: count - 2, count - 2: count - 1, count - 3: 0}.get(k, k)
        scene.add_result(label, box, 0.9)
    analysis = analyse(scene.truth, scene.results)
    page = page_of(analysis, tmp_path)
    heads = page.row("", after="other classes")
    assert len(heads) == 1 + SHOWN + 2
    assert heads[-2:] == ["other classes", "background"]
    for name in (f"class {k}" for k in (0, count - 1, count - 2, count - 3)):
        assert name in heads
        assert sum(map(int, page.row(name, after="other classes")[1:])) == 1
    assert f"class {count - 2} taken for class {count - 1} (1)" in " ".join(page.text.split())
    assert f"the {SHOWN} classes that are most often confused" in page.text


def test_pictures_frame_what_is_wrong() -> None:
    import cv2

    scene = one_of_each()
    errors = analyse(scene.truth, scene.results).tasks["segm"]
    (picture,) = worst_pictures(errors, scene.truth, scene.results)
    (image,) = errors.worst
    assert picture.caption.startswith("1.png: errors: ")
    assert f"left: the annotations, {len(image.not_found)} framed" in picture.caption
    drawn = cv2.imdecode(np.frombuffer(picture.content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    pink = (np.abs(drawn.astype(int) - FRAME) < 40).all(axis=2)
    middle = drawn.shape[1] // 2
    size = middle - GAP // 2
    for side, entries, framed in (
        (pink[:, :size], scene.objects[0], image.not_found),
        (pink[:, -size:], scene.results[0], image.wrong),
    ):
        assert framed
        for place, entry in enumerate(entries):
            x, y, w, h = (round(length * size / error_scenes.SIDE) for length in entry["bbox"])
            right_edge = side[y + h // 3 : y + h // 2, x + w - 3 : x + w + 4].any(axis=1)
            assert right_edge.all() == (place in framed), place
    clean = one_of_each()
    clean.results[0] = clean.results[0][:3]
    del clean.objects[0][3:]
    perfect = analyse(clean.truth, clean.results).tasks["segm"]
    assert worst_pictures(perfect, clean.truth, clean.results) == []


@pytest.fixture(scope="module")
def found_bundle(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A copy of the bundle, and data on which it is right."""
    folder = tmp_path_factory.mktemp("thresholds")
    shutil.copytree(micro_bundle, folder / "bundle")
    edit_manifest(folder / "bundle", lambda values: values.update(thresholds=None, parity=[]))
    return folder / "bundle", write_own_truth(micro_bundle, folder / "data")


def evaluated(bundle: Path, data: Path, *options: object) -> str:
    result = run("eval", bundle, "--data", data, "--backend", "torch", *options)
    assert result.exit_code == 1, result.output  # one backend alone is not compared
    assert "Traceback" not in result.output
    return result.output


def test_eval_shows_the_errors_and_records_the_thresholds(
    found_bundle: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle, data = found_bundle
    page, report = tmp_path / "r.html", tmp_path / "r.json"
    with pytest.raises(BundleError, match="comask eval BUNDLE --data DATA"):
        Bundle.open(bundle).manifest.score_thresholds()
    assert "score thresholds:" not in evaluated(bundle, data, "--no-record")
    assert "other settings" in evaluated(bundle, data, "--proposals", 30)
    assert Bundle.open(bundle).manifest.thresholds is None
    output = evaluated(bundle, data, "--report", page, "--json", report)
    told = json.loads(report.read_text())
    masks = told["errors"]["tasks"]["segm"]
    own = {c["name"]: c["threshold"] for c in masks["classes"] if c["fitted"]}
    assert own
    manifest = Bundle.open(bundle).manifest
    expected = ScoreThresholds(classes=own, backend="torch", data=str(data), images=4)
    assert manifest.thresholds == expected
    assert manifest.parity == []
    assert manifest.score_thresholds() == tuple(
        own.get(category.name, DEFAULT_THRESHOLD) for category in manifest.categories
    )
    count = f"{len(own)} of {len(manifest.categories)} classes"
    assert f"recorded in the bundle for {count}" in output
    assert masks["ap50"] == pytest.approx(told["backends"]["torch"]["segm"]["AP50"] / 100)
    shown = Page(page.read_text())
    assert "Errors of torch" in shown.text
    gain = masks["kinds"]["missed"]["gain"]
    assert shown.row("missed")[1] == points(gain, ".2f")
    # fewer images of the same data change nothing
    assert "those of 4 images" in evaluated(bundle, data, "--limit", 2)
    assert Bundle.open(bundle).manifest.thresholds == expected


def test_older_manifests_have_no_thresholds(micro_bundle: Path, tmp_path: Path) -> None:
    content = json.loads((micro_bundle / "manifest.json").read_text())
    del content["thresholds"]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert Bundle.open(tmp_path).manifest.thresholds is None


def test_a_run_ends_with_an_analysis(micro_run: Path) -> None:
    kept = read_analysis(micro_run)
    assert kept is not None
    assert kept.step == 2
    assert kept.errors.images == 4
    page = Page((micro_run / "report.html").read_text())
    assert "Errors at step 2" in page.text
    worst = kept.errors.tasks["segm"].worst
    assert len(list((micro_run / "pictures").glob("worst-*.jpg"))) == len(worst) > 0
    assert [alt for alt in page.images if ": errors: " in alt and alt.startswith(worst[0].file)]


def test_analyses_survive_json_and_resuming(tmp_path: Path) -> None:
    scene = random_scene(8, 3)
    errors = analyse(scene.truth, scene.results)
    record = RunRecord(tmp_path, keep_until=0)
    assert read_analysis(tmp_path) is None
    record.add_analysis(20, errors)
    assert read_analysis(tmp_path) == Analysis(step=20, errors=errors)
    RunRecord(tmp_path, keep_until=20)
    assert read_analysis(tmp_path) is not None
    RunRecord(tmp_path, keep_until=19)  # step 20 will be trained again
    assert read_analysis(tmp_path) is None


def test_two_processes_analyse_as_one(
    micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comask.data.shapes import ShapesSource

    checkpoint = load_checkpoint(micro_run / "checkpoint-last.pt")
    model = model_from_checkpoint(checkpoint)
    source = ShapesSource(num_images=3, seed=4)

    def scored(rank: int, world: int) -> Any:
        ranks = Ranks(rank=rank, world=world, device=torch.device("cpu"))
        preprocess = checkpoint.config.preprocess
        folder = tmp_path / f"{rank} of {world}"
        return Validator(
            source, [0, 1, 2], preprocess, mask_threshold=0.5, ranks=ranks, pictures=folder
        )(model, 1, last=True)

    alone = scored(0, 1)
    assert alone.errors.images == 3
    sent: list[Any] = []
    monkeypatch.setattr(validation, "gather", lambda part: sent.append(part) or [])
    assert scored(1, 2) is None
    assert not (tmp_path / "1 of 2").exists()  # the first process draws
    monkeypatch.setattr(validation, "gather", lambda part: [part, *sent])
    together = scored(0, 2)
    assert dataclasses.replace(together, errors=None) == dataclasses.replace(alone, errors=None)
    assert together.errors == alone.errors
    assert math.isfinite(together.errors.tasks["segm"].ap50)
