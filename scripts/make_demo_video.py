"""The demo video, models/assets/demo.mp4: two photographs, panned and zoomed, with cuts and four cards with digits.

    python scripts/make_demo_video.py models/assets/demo.mp4

The photographs are those of sklearn.datasets.load_sample_images, the digits those of load_digits, none of which the
small model was trained on; models/assets/README.md names their authors.
"""

import sys

import av
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from models.assets.demo import DEMO_ANSWERS, DEMO_FPS
from models.tasks.digits import SIDE, digit_images, digit_masks, handwriting
from models.tasks.pictures import COLOURS, paint

SECONDS_PER_SHOT = 12
# Photograph, then the square that is seen at the start and at the end of the shot: centre x and y, and side, as
# fractions of the photograph's width, height and height.
SHOTS = (
    ("china.jpg", (0.30, 0.50, 0.95), (0.70, 0.50, 0.95)),
    ("flower.jpg", (0.50, 0.50, 1.00), (0.52, 0.48, 0.45)),
    ("china.jpg", (0.45, 0.35, 0.50), (0.50, 0.50, 1.00)),
    ("flower.jpg", (0.70, 0.50, 0.80), (0.35, 0.50, 0.80)),
    ("china.jpg", (0.50, 0.70, 0.60), (0.50, 0.30, 0.60)),
    ("flower.jpg", (0.40, 0.45, 0.50), (0.60, 0.50, 0.95)),
)
FRAMES_PER_SHOT = DEMO_FPS * SECONDS_PER_SHOT
CARD_FRAMES = DEMO_FPS  # a second
CARD_PLACES = (22, 96, 170, 244)


def view(photograph: Image.Image, square: np.ndarray) -> np.ndarray:
    """The part of the photograph in `square`, SIDE pixels wide and high."""
    width, height = photograph.size
    half = square[2] * height / 2
    x = np.clip(square[0] * width, half, width - half)
    y = np.clip(square[1] * height, half, height - half)
    box = (float(x - half), float(y - half), float(x + half), float(y + half))
    return np.asarray(photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def frames() -> np.ndarray:
    """All frames, the cards among them."""
    seen = []
    for name, first, last in SHOTS:
        photograph = Image.fromarray(load_sample_image(name))
        for fraction in np.linspace(0, 1, FRAMES_PER_SHOT):
            seen.append(view(photograph, (1 - fraction) * np.array(first) + fraction * np.array(last)))
    marks = np.full((len(seen), 2), -1)
    for place, (colour, digit) in zip(CARD_PLACES, DEMO_ANSWERS.items(), strict=True):
        image = digit_images(int(digit), is_held_out=True)[0]
        marks[place : place + CARD_FRAMES] = tuple(COLOURS).index(colour), image
    return paint(np.stack(seen), marks, digit_masks(*handwriting(np.maximum(marks[:, 1], 0))))


def main(path: str) -> None:
    """Writes the file at `path`."""
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        options = {"crf": "28", "preset": "veryslow", "threads": "1"}
        stream = container.add_stream("libx264", rate=DEMO_FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for frame in frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main(sys.argv[1])
