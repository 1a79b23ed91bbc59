"""Write good images and new ones: pieces of a photograph that scikit-learn ships, some of them scratched.

``python examples/demo_images.py FOLDER`` makes ``FOLDER/good``, ``FOLDER/new/normal`` and ``FOLDER/new/defective``.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

SIDE, GOOD, NEW = 96, 100, 40


def main(folder):
    rng = np.random.default_rng(0)
    photograph = Image.fromarray(load_sample_image("flower.jpg"))

    def piece():
        left, top = (int(rng.integers(full - SIDE)) for full in photograph.size)
        return photograph.crop((left, top, left + SIDE, top + SIDE))

    def scratched(image):
        """A thin bright or dark line, a third to two thirds of the image long."""
        start, angle, length = rng.uniform(20, SIDE - 20, 2), rng.uniform(0, 2 * np.pi), rng.uniform(30, 60)
        end = start + length * np.array([np.cos(angle), np.sin(angle)])
        grey = int(rng.choice([30, 230]))
        ImageDraw.Draw(image).line([*start, *end], fill=(grey,) * 3, width=2)
        return image

    for name, count, change in (
        ("good", GOOD, lambda image: image),
        ("new/normal", NEW // 2, lambda image: image),
        ("new/defective", NEW // 2, scratched),
    ):
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            change(piece()).save(target / f"{i:03d}.png")


if __name__ == "__main__":
    main(sys.argv[1])
