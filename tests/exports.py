"""Writes one small data set as each annotation tool exports it, and compares what comask reads.

The expectation is COCO's form, read by pycocotools; no writer uses code of comask's readers.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask
import yaml
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO

from comask.data.coco import write_coco
from comask.data.open_data import open_source
from comask.data.shapes import ShapesSource
from comask.data.source import InstanceSource

Content = dict[str, Any]
Export = Callable[[Path, Path], None]  # (the set in COCO's form, the folder to write to)
IMAGES, VALIDATION = (
    8,
    2,
)  # images of the set, and how many of them, the last ones, are for validation
CLASSES = ("bolt", "große Schraube", "no")  # `no` is a Boolean of YAML
VOC_CLASSES = ("aeroplane", "car", "person")  # what `voc` calls them


def coco_set(folder: Path, images: int = IMAGES) -> Path:
    """Writes shapes of three classes, whose objects are polygons of one part, in COCO's form.

    The third image has no object, and file names have a space and an umlaut.
    """
    write_coco(ShapesSource(num_images=images, seed=21), folder)
    file = folder / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    for image in content["images"]:
        name = f"clip {image['id'] % 4} für {image['id']:03}.png"
        (folder / "images" / image["file_name"]).rename(folder / "images" / name)
        image["file_name"] = name
    content["annotations"] = [
        outlined(entry, content["images"][entry["image_id"] - 1])
        for entry in content["annotations"]
        if entry["image_id"] != 3
    ]
    file.write_text(json.dumps(content))
    return folder


def outlined(entry: Content, image: Content) -> Content:
    """The object with the polygon around the largest part of its mask."""
    mask = pycocotools.mask.decode(entry["segmentation"])
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygon = max(outlines, key=cv2.contourArea).reshape(-1).astype(float).tolist()
    xs, ys = polygon[::2], polygon[1::2]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    category = (entry["category_id"] - 1) % len(CLASSES) + 1
    return entry | {"segmentation": [polygon], "bbox": box, "category_id": category, "iscrowd": 0}


def content_of(folder: Path) -> Content:
    content: Content = json.loads((folder / "annotations" / "instances.json").read_text())
    return content


def parts_of(content: Content) -> dict[str, Content]:
    """The part for training and that for validation."""
    split = len(content["images"]) - VALIDATION
    parts = {"train": content["images"][:split], "valid": content["images"][split:]}
    return {
        name: content | {
            "images": images,
            "annotations": [entry for image in images for entry in objects_of(content, image)],
        }
        for name, images in parts.items()
    }  # fmt: skip


def objects_of(content: Content, image: Content) -> list[Content]:
    return [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]


def disjoint(folder: Path) -> Path:
    """Replaces the masks of a set in COCO's form by disjoint ones in RLE, as pictures can hold them."""
    content = content_of(folder)
    for image in content["images"]:
        covered = np.zeros((image["height"], image["width"]), bool)
        for entry in objects_of(content, image):
            mask = mask_of(entry, image) & ~covered
            covered |= mask
            if not mask.any():
                content["annotations"].remove(entry)
                continue
            rle = pycocotools.mask.encode(np.asfortranarray(mask, np.uint8))
            entry["bbox"] = pycocotools.mask.toBbox(rle).tolist()
            entry["segmentation"] = rle | {"counts": rle["counts"].decode()}
    (folder / "annotations" / "instances.json").write_text(json.dumps(content))
    return folder


def mask_of(entry: Content, image: Content) -> NDArray[np.bool_]:
    """The mask of an object, by pycocotools."""
    segmentation = entry["segmentation"]
    if isinstance(segmentation, list):
        parts = pycocotools.mask.frPyObjects(segmentation, image["height"], image["width"])
        segmentation = pycocotools.mask.merge(parts)
    return np.asarray(pycocotools.mask.decode(segmentation), bool)


def json_file(coco: Path, folder: Path) -> None:
    """A JSON file with its image folder, as Label Studio writes them."""
    shutil.copytree(coco / "images", folder / "images")
    (folder / "result.json").write_text(json.dumps(content_of(coco)))


def coco2017(coco: Path, folder: Path) -> None:
    for name, part in parts_of(content_of(coco)).items():
        subset = {"train": "train2017", "valid": "val2017"}[name]
        _images(coco, part, folder / subset)
        _write(folder / "annotations" / f"instances_{subset}.json", part)


def roboflow(coco: Path, folder: Path) -> None:
    """Roboflow has the images beside the file, and a class 0 without objects."""
    for name, part in parts_of(content_of(coco)).items():
        group = {"id": 0, "name": "bolts", "supercategory": "none"}
        _images(coco, part, folder / name)
        part = part | {"categories": [group, *part["categories"]]}
        _write(folder / name / "_annotations.coco.json", part)


def cvat(coco: Path, folder: Path) -> None:
    """CVAT writes a file for each subset, and names a single one `default`."""
    _images(coco, content_of(coco), folder / "images")
    _write(folder / "annotations" / "instances_default.json", content_of(coco))


def cvat_subsets(coco: Path, folder: Path) -> None:
    for name, part in parts_of(content_of(coco)).items():
        subset = {"train": "Train", "valid": "Validation"}[name]
        _images(coco, part, folder / "images" / subset)
        _write(folder / "annotations" / f"instances_{subset}.json", part)


def yolo(coco: Path, folder: Path, names: Any = None, **keys: Any) -> None:
    """Ultralytics' form: images/train and labels/train; an image without objects has no text file."""
    for name, part in parts_of(content_of(coco)).items():
        _images(coco, part, folder / "images" / name)
        (folder / "labels" / name).mkdir(parents=True)
        for image in part["images"]:
            lines = [yolo_line(entry, image) for entry in objects_of(part, image)]
            file = folder / "labels" / name / (Path(image["file_name"]).stem + ".txt")
            if lines:
                file.write_text("".join(line + "\r\n" for line in lines), newline="")
    content = {
        "path": ".",
        "train": "images/train",
        "val": "images/valid",
        "names": names or [*CLASSES],
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(content | keys), encoding="utf-8-sig")


def yolo_roboflow(coco: Path, folder: Path) -> None:
    """Roboflow's form: train/images and train/labels, and paths from a folder below."""
    for name, part in parts_of(content_of(coco)).items():
        _images(coco, part, folder / name / "images")
        (folder / name / "labels").mkdir()
        for image in part["images"]:
            lines = [yolo_line(entry, image) for entry in objects_of(part, image)]
            file = folder / name / "labels" / (Path(image["file_name"]).stem + ".txt")
            file.write_text("\n".join(lines))
    (folder / "data.yaml").write_text(yaml.safe_dump({
        "train": "../train/images", "val": "../valid/images", "test": "../test/images",
        "nc": len(CLASSES), "names": dict(enumerate(CLASSES)),
    }))  # fmt: skip


def yolo_line(entry: Content, image: Content) -> str:
    """The class's number from 0 on, and the polygon in shares of the image's sides."""
    (polygon,) = entry["segmentation"]
    sides = (image["width"], image["height"])
    shares = [f"{value / sides[i % 2]:.9f}" for i, value in enumerate(polygon)]
    return " ".join([str(entry["category_id"] - 1), *shares])


def palette(colours: int = 256) -> list[int]:
    """VOC's colour map, written out: the bits of an index, spread over three channels."""
    flat = []
    for index in range(colours):
        bits = [index >> bit & 1 for bit in range(8)] + [0]
        flat += [sum(bits[channel + 3 * i] << (7 - i) for i in range(3)) for channel in range(3)]
    return flat


def voc(coco: Path, folder: Path) -> None:
    """VOC's own form: pictures with a palette; seams between objects have the index 255."""
    content = content_of(coco)
    numbers = {1: 1, 2: 7, 3: 15}  # aeroplane, car and person
    _pictures(coco, folder, content, numbers, lambda indices: _with_palette(indices))
    for name, part in parts_of(content).items():
        listed = "".join(Path(image["file_name"]).stem + "\n" for image in part["images"])
        file = (
            folder / "ImageSets" / "Segmentation" / {"train": "train.txt", "valid": "val.txt"}[name]
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(listed)


def cvat_masks(coco: Path, folder: Path) -> None:
    """CVAT's "segmentation mask 1.1": pictures in RGB, a table of colours, and one list of all images.

    An image without objects is listed, but has no pictures.
    """
    content = content_of(coco)
    colours = np.array(palette(), np.uint8).reshape(-1, 3)
    _pictures(
        coco, folder, content, {1: 1, 2: 2, 3: 3}, lambda indices: Image.fromarray(colours[indices])
    )
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::"]
    lines += [f"{name}:{','.join(map(str, colours[i]))}::" for i, name in enumerate(CLASSES, 1)]
    (folder / "labelmap.txt").write_text("\n".join(lines) + "\n")
    listed = "".join(Path(image["file_name"]).stem + "\n" for image in content["images"])
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "default.txt").write_text(listed)


def _pictures(
    coco: Path,
    folder: Path,
    content: Content,
    numbers: dict[int, int],
    painted: Callable[[NDArray[np.uint8]], Image.Image],
) -> None:
    """Writes the image of all objects and that of their classes."""
    _images(coco, content, folder / "JPEGImages")
    for kind in ("SegmentationObject", "SegmentationClass"):
        (folder / kind).mkdir()
    for image in content["images"]:
        objects, classes = (np.zeros((image["height"], image["width"]), np.uint8) for _ in "oc")
        for number, entry in enumerate(objects_of(content, image), 1):
            mask = mask_of(entry, image)
            objects[mask], classes[mask] = number, numbers[entry["category_id"]]
        if not objects.any():
            continue
        name = Path(image["file_name"]).stem + ".png"
        painted(objects).save(folder / "SegmentationObject" / name)
        painted(classes).save(folder / "SegmentationClass" / name)


def _with_palette(indices: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette(palette())
    return image


def labelme(coco: Path, folder: Path) -> None:
    """LabelMe's form: a JSON file beside each image."""
    _images(coco, content_of(coco), folder)
    _labelme_files(content_of(coco), folder, "")


def labelme_parted(coco: Path, folder: Path) -> None:
    """JSON files apart from the images, for training and validation, written on Windows."""
    _images(coco, content_of(coco), folder / "images")
    for name, part in parts_of(content_of(coco)).items():
        _labelme_files(part, folder / name, "..\\images\\")


def _labelme_files(content: Content, folder: Path, before: str) -> None:
    folder.mkdir(exist_ok=True)
    for image in content["images"]:
        shapes = [
            labelme_shape(CLASSES[entry["category_id"] - 1], entry["segmentation"][0])
            for entry in objects_of(content, image)
        ]
        labelme_file(folder, image, shapes, before + image["file_name"])


def labelme_file(folder: Path, image: Content, shapes: list[Content], path: str = "") -> Path:
    """Writes the JSON file of an image."""
    file = folder / (Path(image["file_name"]).stem + ".json")
    file.write_text(json.dumps({
        "version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": path or image["file_name"],
        "imageData": None, "imageHeight": image["height"], "imageWidth": image["width"],
    }))  # fmt: skip
    return file


def labelme_shape(
    label: str, numbers: list[float], kind: str | None = "polygon", **more: Any
) -> Content:
    """A shape of points [x1, y1, x2, …]."""
    points = np.reshape(numbers, (-1, 2)).tolist()
    shape: Content = {
        "label": label,
        "points": points,
        "group_id": None,
        "shape_type": kind,
        "flags": {},
    }
    return shape | more


def png_text(mask: NDArray[np.bool_]) -> str:
    """A mask as LabelMe stores it."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _images(coco: Path, content: Content, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        shutil.copy(coco / "images" / image["file_name"], folder)


def _write(file: Path, content: Content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_yaml(folder: Path, **keys: Any) -> None:
    (folder / "data.yaml").write_text(yaml.safe_dump({"names": [*CLASSES]} | keys))


def expected(origin: Path, names: tuple[str, ...] = CLASSES) -> dict[str, list[Any]]:
    """By image: class, box and mask of each object, as pycocotools reads COCO's form."""
    coco = COCO(origin / "annotations" / "instances.json")
    return {
        Path(image["file_name"]).stem: sorted(
            (names[a["category_id"] - 1], [round(v, 3) for v in a["bbox"]], coco.annToMask(a).tobytes())
            for a in coco.imgToAnns[image["id"]]
        )
        for image in coco.imgs.values()
    }  # fmt: skip


def found(source: InstanceSource) -> dict[str, list[Any]]:
    """The same, as comask read a data set."""
    names = {category.id: category.name for category in source.categories}
    result = {}
    for index in range(len(source)):
        info = source.info(index)
        image = {"height": info.height, "width": info.width}
        assert source.image(index).shape[:2] == (info.height, info.width)
        result[Path(info.file_name).stem] = sorted(
            (names[a["category_id"]], [round(v, 3) for v in a["bbox"]],
             mask_of(a, image).astype(np.uint8).tobytes())
            for a in source.annotations(index)
        )  # fmt: skip
    return result


def opened(folder: Path, split: str = "train") -> tuple[InstanceSource, list[str]]:
    """The sound part, and the lines on the rest."""
    lines: list[str] = []
    source = open_source(
        str(folder), split, shapes_images=0, shapes_seed=0, report=lines.append
    )  # fmt: skip
    return source, lines
