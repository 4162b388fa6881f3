"""Encodes models/assets/demo.mp4: two photographs, panned and zoomed, with cuts between them.

    python scripts/make_demo_video.py models/assets/demo.mp4

The photographs are those of sklearn.datasets.load_sample_images; models/assets/README.md names their authors.
"""

import sys

import av
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

SIDE = 224
FPS = 8
SECONDS_PER_SHOT = 6
# Photograph, then the square that is seen at the start and at the end of the shot: centre x and y, and side, as shares
# of the photograph's width, height and height.
SHOTS = (
    ("china.jpg", (0.30, 0.50, 0.95), (0.70, 0.50, 0.95)),
    ("flower.jpg", (0.50, 0.50, 1.00), (0.52, 0.48, 0.45)),
    ("china.jpg", (0.45, 0.35, 0.50), (0.50, 0.50, 1.00)),
    ("flower.jpg", (0.70, 0.50, 0.80), (0.35, 0.50, 0.80)),
    ("china.jpg", (0.50, 0.70, 0.60), (0.50, 0.30, 0.60)),
    ("flower.jpg", (0.40, 0.45, 0.50), (0.60, 0.50, 0.95)),
)


def view(photograph: Image.Image, square: np.ndarray) -> Image.Image:
    """The part of the photograph in `square`, SIDE pixels wide and high."""
    width, height = photograph.size
    half = square[2] * height / 2
    x = np.clip(square[0] * width, half, width - half)
    y = np.clip(square[1] * height, half, height - half)
    box = (float(x - half), float(y - half), float(x + half), float(y + half))
    return photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)


def main(path: str) -> None:
    """Writes the file at `path`."""
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "28", "preset": "veryslow", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for name, first, last in SHOTS:
            photograph = Image.fromarray(load_sample_image(name))
            for share in np.linspace(0, 1, FPS * SECONDS_PER_SHOT):
                square = (1 - share) * np.array(first) + share * np.array(last)
                container.mux(stream.encode(av.VideoFrame.from_image(view(photograph, square))))
        container.mux(stream.encode())


if __name__ == "__main__":
    main(sys.argv[1])
