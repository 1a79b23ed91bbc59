"""
Where it is strange
===================

A map of each image says which of its places are unlike those of normal images. Pieces of one photograph, which comes
with scikit-learn, are what is normal; in other pieces of it small defects are painted.
"""

import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

from pyro_vje import TrainConfig, learn_maps, score, train

root, rng = Path(tempfile.mkdtemp()), np.random.default_rng(0)
photograph = Image.fromarray(load_sample_image("china.jpg"))


def piece(left, right):
    """A random piece of 64 × 64 pixels of the roofs, within these columns."""
    x, y = rng.integers(left, right - 64), rng.integers(150, 250)
    return photograph.crop((x, y, x + 64, y + 64))


for folder in ("good", "new/normal", "new/defect", "masks/defect"):
    (root / folder).mkdir(parents=True)
for i in range(120):
    piece(0, 400).save(root / "good" / f"{i:03d}.png")
for i in range(16):
    piece(400, 640).save(root / "new/normal" / f"{i:02d}.png")
    image, mask = piece(400, 640), Image.new("L", (64, 64))
    x, y = rng.integers(8, 44, 2)
    for target, colour in ((image, (40, 220, 160)), (mask, 255)):
        ImageDraw.Draw(target).line((x, y, x + 10, y + 9), fill=colour, width=4)
    image.save(root / "new/defect" / f"{i:02d}.png")
    mask.save(root / "masks/defect" / f"{i:02d}.png")

# %%
# Train, and learn maps
# ---------------------
#
# On the command line ``pyro-vje inspect good/ new/ --maps`` does all of this, with a pretrained network where one is
# installed. Here it is a small one, trained on the pieces; a quarter of them is held out, to calibrate.
settings = {"encoder": "resnet-small", "image_size": 64, "batch_size": 32, "holdout": 0.25}
run = train(TrainConfig("images", str(root / "good"), epochs=2, **settings), root / "run")
learn_maps(run)

# %%
# Score by the map
# ----------------
#
# The score ``places`` is the mean over the strangest 3 % of the map. ``masks`` compares the maps with where the defects
# are. A mark is where a map exceeds what all but a tenth of normal images do not exceed anywhere.
result = score(
    run,
    data=root / "new",
    score="places",
    maps=True,
    masks=root / "masks",
    alpha=0.1,
    normal_class="normal",
    report=True,
)
about = json.loads(result.summary.read_text())["maps"]
print(f"AUROC of images {result.auroc:.3f}, of pixels {result.pixels['pixel_auroc']:.3f}")
print(f"{about['marked_images']} of {result.scored} images have a mark")

# %%
# What a map looks like
# ---------------------
#
# A map is a 16-bit PNG of its image's size, in hundredths of a nat: here four defects, and four normal pieces. The
# page, ``scores_report.html``, has them over the images.
figure, axes = plt.subplots(2, 8, figsize=(9, 2.5))
names = [f"{kind}/{i:02d}.png" for kind in ("defect", "normal") for i in range(4)]
maps = [np.asarray(Image.open(result.maps / f"{name}.png")).astype(float) for name in names]
for (top, bottom), name, levels in zip(axes.T, names, maps, strict=True):
    top.imshow(Image.open(root / "new" / name))
    bottom.imshow(levels, cmap="cividis", vmin=about["ordinary_level"] / 2, vmax=max(x.max() for x in maps))
    if (levels > about["threshold_level"]).any():
        bottom.contour(levels, [about["threshold_level"]], colors="white", linewidths=1)
    top.axis("off")
    bottom.axis("off")
