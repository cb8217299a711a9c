"""What a calibration saw, as `calibration.json`: enough for every method, and for going on later."""

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

FORMAT = 1  # of the file
CACHE = "calibration.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Histograms of a bundle's activations over some images. Neither order nor interruptions tell.

    Attributes:
        graphs: sha256 of the fp32 graphs by file name.
        preprocess: of the images.
        images: names of those that were seen, by sha256 of their pixels.
        histograms: of |x| by activation, as `comask.calib.qdq.activations` names those of both
            stages.
    """

    graphs: dict[str, str]
    preprocess: PreprocessConfig
    images: dict[str, str]
    histograms: dict[str, Histogram]

    @classmethod
    def empty(cls, bundle: Bundle) -> Calibration:
        """That of a bundle before the first image."""
        files = [graph_file(stage, "fp32") for stage in ("stage1", "stage2")]
        graphs = {name: bundle.manifest.files[name] for name in files}
        return cls(graphs, bundle.manifest.preprocess, {}, {})

    def ranges(self, method: Method = "error", *, percentile: float = 99.99) -> dict[str, float]:
        """The largest magnitude that int8 is to cover, by activation.

        Activations that no image had a value for are absent, as those of detections are where
        nothing was detected. A range is 0 where all values were.

        Args:
            method: `error` clips where the squared error is least, `entropy` where the distribution
                suffers least, `percentile` what is beyond it, `minmax` nothing.
            percentile: of the magnitudes, above 0 and up to 100.

        Raises:
            ConfigError: when the percentile is none.
        """
        if not 0 < percentile <= 100:
            raise ConfigError(f"a percentile of {percentile}; expected above 0 and up to 100")
        found = {key: histogram for key, histogram in self.histograms.items() if histogram.total}
        if method == "minmax":
            return {key: histogram.largest for key, histogram in found.items()}
        if method == "percentile":
            return {key: percentile_threshold(h, percentile) for key, h in found.items()}
        find = error_threshold if method == "error" else entropy_threshold
        return {key: find(histogram) for key, histogram in found.items()}

    def require(self, bundle: Bundle, path: Path) -> None:
        """Checks that this cache, read from `path`, is of a bundle.

        Raises:
            CalibrationError: when graphs or preprocessing differ.
        """
        own, other = Calibration.empty(bundle), str(bundle.folder)
        for name, expected in own.graphs.items():
            found = self.graphs.get(name, "none")
            if found != expected:
                raise CalibrationError(
                    f"{path}: is of another {name} (sha256 {found[:12]}…) than {other} holds "
                    f"({expected[:12]}…); name another cache, or delete this one"
                )
        for field in dataclasses.fields(PreprocessConfig):
            found, expected = (getattr(c.preprocess, field.name) for c in (self, own))
            if found != expected:
                raise CalibrationError(
                    f"{path}: was made with preprocess.{field.name} = {found}, {other} has {expected}; "
                    f"name another cache, or delete this one"
                )

    def save(self, path: Path) -> None:
        """Writes the cache whole or not at all: an image or an activation a line."""
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
        """Inverse of `save`.

        Raises:
            CalibrationError: when there is no cache that this comask reads.
        """
        try:
            content = parse_json(path.read_bytes())
            if content["format"] != FORMAT:
                raise CalibrationError(
                    f"{path}: has format {content['format']!r}, this comask reads {FORMAT}; delete "
                    f"it and calibrate again"
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
        # OverflowError: of integers that numpy cannot hold
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CalibrationError(
                f"{path}: is no calibration cache ({error}); name another, or delete it"
            ) from error
