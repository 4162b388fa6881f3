"""Reference data tests/models/golden/preprocess.safetensors: images and the patches transformers makes of them.

Runs in an environment of its own (Python 3.11: torch==2.13.0 transformers==5.23.0 pillow safetensors numpy):

    python scripts/make_golden_preprocess.py tests/models/golden/preprocess.safetensors
"""

import sys

import numpy as np
from safetensors.numpy import save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# Rows and columns. The last three are resampled: rounded to whole tokens, shrunk to the upper limit, grown to the
# lower one.
SIZES = ((28, 28), (28, 84), (56, 28), (45, 70), (140, 168), (10, 14))
SIZE = {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}


def main(path: str) -> None:
    """Writes the file at `path`."""
    processor = Qwen2VLImageProcessorPil(size=SIZE)
    rng = np.random.default_rng(0)
    tensors = {}
    for number, (rows, columns) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
        output = processor(images=[pixels], return_tensors="np")
        tensors[f"pixels.{number}"] = pixels
        tensors[f"patches.{number}"] = np.asarray(output["pixel_values"], np.float32)
        tensors[f"grid.{number}"] = np.asarray(output["image_grid_thw"][0], np.int32)
    save_file(tensors, path, metadata={"transformers": "5.23.0", "min_pixels": "784", "max_pixels": "3136"})


if __name__ == "__main__":
    main(sys.argv[1])
