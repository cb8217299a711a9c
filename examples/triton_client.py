"""Sends images to a Triton server with a model repository from `comask serve`.

Run `python examples/triton_client.py photo.jpg more/*.jpg --url localhost:8000`. It needs
`pip install 'tritonclient[http]'` but not comask. Several requests are sent at the same time, so that the
server can combine them into batches. If a file cannot be read, the program reports it and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tritonclient.http import InferInput, InferResult


def encoded_image(data: bytes) -> InferInput:
    """Returns the input of a request for one encoded image; further rows would be further images."""
    import numpy as np
    from tritonclient.http import InferInput

    tensor = InferInput("image", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[data]], dtype=object))
    return tensor


def instances(result: InferResult, row: int) -> list[dict[str, Any]]:
    """Returns the instances of one image of a response, with masks as COCO's RLE."""
    outputs = {
        name: result.as_numpy(name)[row]
        for name in ("boxes", "scores", "category_ids", "class_names", "rle_counts", "image_size")
    }
    return [
        {
            "class_name": outputs["class_names"][i].decode(),
            "category_id": int(outputs["category_ids"][i]),
            "score": float(outputs["scores"][i]),
            "box_xyxy": outputs["boxes"][i].tolist(),
            "segmentation": {
                "size": outputs["image_size"].tolist(),
                "counts": outputs["rle_counts"][i].decode(),
            },
        }
        for i in range(int(result.as_numpy("num_detections")[row, 0]))
    ]


def ask(arguments: argparse.Namespace) -> int:
    """Prints one line per image and returns the exit code."""
    from tritonclient.http import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    answers: dict[str, list[dict[str, Any]] | None] = {}
    with InferenceServerClient(arguments.url, concurrency=arguments.concurrency) as client:
        settings = client.get_model_config(arguments.model)["parameters"]
        weights = settings["weights_sha256"]["string_value"]
        print(f"{arguments.model}: {settings['backend']['string_value']}, weights {weights[:12]}…")
        # the client supports only one thread, which can send many requests at once
        requests = {}
        for path in arguments.images:
            try:
                image = encoded_image(path.read_bytes())
            except OSError as error:
                print(f"{path}: {error.strerror}", file=sys.stderr)
                answers[str(path)] = None
                continue
            requests[path] = client.async_infer(arguments.model, [image])
        for path, request in requests.items():
            try:
                of_image = instances(request.get_result(), 0)
            except InferenceServerException as error:
                print(f"{path}: {error.message()}", file=sys.stderr)
                answers[str(path)] = None
                continue
            best = max((instance["score"] for instance in of_image), default=0.0)
            print(f"{path}: {len(of_image)} instances, best score {best:.4f}")
            answers[str(path)] = of_image
    if arguments.json:
        arguments.json.write_text(json.dumps(answers, indent=2) + "\n")
    return int(None in answers.values())


def main() -> None:
    """Reads the command line and exits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--model", default="comask")
    parser.add_argument(
        "--concurrency", type=int, default=8, help="number of simultaneous requests"
    )
    parser.add_argument("--json", type=Path, help="write all instances to this file")
    try:
        sys.exit(ask(parser.parse_args()))
    except ImportError as error:
        sys.exit(f"error: {error}: pip install 'tritonclient[http]'")
    except Exception as error:  # from the server, the network or a file
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
