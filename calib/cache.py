"""`Calibration`: histograms of activations, kept in `calibration.json` for all methods and later runs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from comask.bundle import Bundle, graph_file
from comask.calib.histograms import (
    Histogram,
    entropy_threshold,
    error_threshold,
    percentile_threshold,
)
from comask.calib.options import Method
from comask.config import PreprocessConfig
from comask.config_reading import from_dict
from comask.errors import CalibrationError, ConfigError
from comask.files import parse_json, write_whole

FORMAT = 1  # the version of the file's format
CACHE = "calibration.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Histograms of a bundle's activations over some images, whose order does not matter.

    Attributes:
        graphs: the SHA-256 of the fp32 graphs by file name.
        preprocess: the preprocessing of the images.
        images: the names of the counted images, by the SHA-256 of their pixels.
        histograms: the histograms of |x| by activation; `comask.calib.qdq.activations` names the
            activations of both stages.
    """

    graphs: dict[str, str]
    preprocess: PreprocessConfig
    images: dict[str, str]
    histograms: dict[str, Histogram]

    @classmethod
    def empty(cls, bundle: Bundle) -> Calibration:
        """Returns the calibration of a bundle before the first image."""
        files = [graph_file(stage, "fp32") for stage in ("stage1", "stage2")]
        graphs = {name: bundle.manifest.files[name] for name in files}
        return cls(graphs, bundle.manifest.preprocess, {}, {})

    def ranges(self, method: Method = "error", *, percentile: float = 99.99) -> dict[str, float]:
        """Returns the largest magnitude that int8 must cover, by activation.

        Activations without values are left out, such as those of detections if nothing was detected. If
        all values are 0, the range is 0.

        Args:
            method: where to clip. `error` minimises the squared error, `entropy` the change of the
                distribution, `percentile` clips beyond the percentile, and `minmax` does not clip.
            percentile: the percentile of the magnitudes, above 0 and up to 100.

        Raises:
            ConfigError: the percentile is out of range.
        """
        if not 0 < percentile <= 100:
            raise ConfigError(f"a percentile of {percentile}; expected above 0 and up to 100")
        filled = {key: histogram for key, histogram in self.histograms.items() if histogram.total}
        if method == "minmax":
            return {key: histogram.largest for key, histogram in filled.items()}
        if method == "percentile":
            return {key: percentile_threshold(h, percentile) for key, h in filled.items()}
        find = error_threshold if method == "error" else entropy_threshold
        return {key: find(histogram) for key, histogram in filled.items()}

    def require(self, bundle: Bundle, path: Path) -> None:
        """Checks that this cache, read from `path`, belongs to a bundle.

        Raises:
            CalibrationError: graphs or preprocessing differ.
        """
        own, other = Calibration.empty(bundle), str(bundle.folder)
        for name, expected in own.graphs.items():
            cached = self.graphs.get(name, "none")
            if cached != expected:
                raise CalibrationError(
                    f"{path}: belongs to another {name} (sha256 {cached[:12]}…) than the one in {other} "
                    f"({expected[:12]}…); delete it, and calibrate again"
                )
        for field in dataclasses.fields(PreprocessConfig):
            cached, expected = (getattr(c.preprocess, field.name) for c in (self, own))
            if cached != expected:
                raise CalibrationError(
                    f"{path}: was made with preprocess.{field.name} = {cached}, but {other} has "
                    f"{expected}; delete it, and calibrate again"
                )

    def save(self, path: Path) -> None:
        """Writes the cache atomically, with one image or activation per line."""
        header = {
            "format": FORMAT,
            "graphs": self.graphs,
            "preprocess": dataclasses.asdict(self.preprocess),
        }
        images = [{"name": name, "sha256": sha256} for sha256, name in self.images.items()]
        activations = {key: h.to_dict() for key, h in self.histograms.items()}
        lines = [
            *(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in header.items()),
            '"images": [\n' + ",\n".join(map(json.dumps, images)) + "\n]",
            '"activations": {\n'
            + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in activations.items())
            + "\n}",
        ]
        write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Reads a cache that `save` wrote.

        Raises:
            CalibrationError: the file is missing, or is not a cache that this comask reads.
        """
        try:
            content = parse_json(path.read_bytes())
            if content["format"] != FORMAT:
                raise CalibrationError(
                    f"{path}: has format {content['format']!r}, this comask reads {FORMAT}; delete "
                    f"it, and calibrate again"
                )
            return cls(
                graphs=dict(content["graphs"]),
                preprocess=from_dict(PreprocessConfig, content["preprocess"], "preprocess."),
                images={entry["sha256"]: entry["name"] for entry in content["images"]},
                histograms={
                    key: Histogram.from_dict(values)
                    for key, values in content["activations"].items()
                },
            )
        except CalibrationError:
            raise
        except OSError as error:
            raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
        # OverflowError: an integer is too large for numpy.
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CalibrationError(
                f"{path}: is not a calibration cache ({error}); delete it, and calibrate again"
            ) from error
