"""
Anomaly scores for my folder
============================

From a folder of images to a p-value for each new one and a page to send to a colleague. The script draws its
folders: 600 handwritten digits are what is normal, and among the new images there are crosses and squares.
"""

import csv
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from pyro_vje import TrainConfig, score, train

root = Path(tempfile.mkdtemp())


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((16, 16), Image.Resampling.BILINEAR).save(path)


digits = [Image.fromarray((15 * pixels).astype("uint8")) for pixels in load_digits().images]
for i in range(600):
    save(digits[i], root / "photos" / f"{i:03d}.png")
for i in range(80):
    save(digits[1000 + i], root / "new" / "normal" / f"{i:02d}.png")
for i in range(8):
    for kind, near in (("cross", 4 + i), ("square", 8 + i)):
        image = Image.new("L", (64, 64))
        corners = (near, near, 63 - near, 63 - near)
        if kind == "cross":
            ImageDraw.Draw(image).line(corners, fill=255, width=10)
            ImageDraw.Draw(image).line((near, 63 - near, 63 - near, near), fill=255, width=10)
        else:
            ImageDraw.Draw(image).rectangle(corners, outline=255, width=10)
        save(image, root / "new" / kind / f"{i}.png")

# %%
# Train
# -----
#
# On the command line: ``pyro-vje train --dataset folder --data-dir photos/ --holdout 0.2 ... --out run``. A
# fifth of the images is kept out of training. They calibrate the scores: with n of them no p-value is below 1 /
# (n + 1).
settings = {"encoder": "resnet-small", "image_size": 16, "batch_size": 64}
config = TrainConfig("folder", str(root / "photos"), holdout=0.2, epochs=10, **settings)
run = train(config, root / "run")

# %%
# Score
# -----
#
# ``pyro-vje score --ckpt run --data new/ --fdr 0.1 --report``. The score is ``aggregate`` unless told: how dense the
# training images are around the new one (:doc:`/scores` compares them all). ``fdr`` decides: of the images that
# are called anomalies a tenth, in expectation, is normal. A class folder named ``normal`` lets it also say how
# well that went.
result = score(run, data=root / "new", fdr=0.1, report=True)
print(f"{result.flagged} of {result.scored} called anomalies; AUROC {result.auroc:.3f}")

# %%
# The table
# ---------
#
# ``scores.csv`` has a row for each image. The report, ``scores_report.html``, is one file that needs nothing
# else.
with open(result.csv, newline="") as file:
    rows = sorted(csv.DictReader(file), key=lambda row: -float(row["anomaly_score"]))
for row in rows[:20]:
    print(f"{row['p_value']}  {row['decision']:8} {Path(row['path']).relative_to(root)}")

figure, axes = plt.subplots(2, 10, figsize=(9, 2.4))
for ax, row in zip(axes.flat, rows, strict=False):
    ax.imshow(Image.open(row["path"]), cmap="gray")
    ax.set_title(f"p = {float(row['p_value']):.3f}", fontsize=8)
    ax.axis("off")
