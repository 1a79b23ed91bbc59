"""The picture of the front page: ``python docs/plots/overview.py`` trains on the digits (a minute) and draws it.

It is committed as docs/images/overview.svg, so that neither the site nor the README has to train for it.
"""

import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Ellipse
from PIL import Image, ImageDraw

from pyro_vje import TrainConfig, load_run, train
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.data import ImageSet, load_dataset, views_for
from pyro_vje.metrics.detection import conformal_p_values
from pyro_vje.model.encoding import encode
from pyro_vje.runs.folder import CALIBRATION, REFERENCE, load_posteriors

OUT = Path(__file__).parents[1] / "images" / "overview.svg"
plt.rcParams.update({"svg.hashsalt": "overview", "font.size": 9})


def strangers() -> torch.Tensor:
    """A cross, a square and a bar, uint8 (3, 3, 16, 16)."""
    drawn = []
    for lines in ([(10, 10, 54, 54), (10, 54, 54, 10)], [(12, 12, 52, 12, 52, 52, 12, 52, 12, 8)], [(6, 32, 58, 32)]):
        image = Image.new("L", (64, 64))
        for line in lines:
            ImageDraw.Draw(image).line(line, fill=255, width=10)
        pixels = torch.frombuffer(bytearray(image.resize((16, 16)).tobytes()), dtype=torch.uint8)
        drawn.append(pixels.view(1, 16, 16).expand(3, -1, -1))
    return torch.stack(drawn)


def main(folder: Path) -> None:
    run = load_run(folder)
    test = load_dataset("digits", split="test")
    known = encode(run.vje, test, run.info.view)

    figure = plt.figure(figsize=(9.6, 3.3), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1.5, 3.4, 4.7))

    views, clean = views_for("digits", 16)
    first, second = views(test.images[11:12], torch.Generator().manual_seed(4))
    panels = left.subplots(3, 1)
    pictures = (test.images[11].float() / 255, *(view[0] * 0.37 + 0.31 for view in (first, second)))
    for ax, picture, title in zip(panels, pictures, ("an image", "two views of it", ""), strict=True):
        ax.imshow(picture.mean(0), cmap="gray", vmin=0)
        ax.set_title(title)
        ax.axis("off")

    ax = middle.subplots()
    centred = known.loc - known.loc.mean(0)
    plane = torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    points = centred @ plane
    sizes = (known.scale.square() @ plane.square()).sqrt()
    colours = plt.get_cmap("tab10")
    for point, size, label in zip(points.tolist(), sizes.tolist(), test.labels.tolist(), strict=True):
        ax.add_patch(Ellipse(point, *size, fc=colours(label), ec="none", alpha=0.22))
    ax.scatter(*points.T, s=5, c=[colours(label) for label in test.labels.tolist()])
    for label in range(10):
        ax.annotate(str(label), points[test.labels == label].median(0).values.tolist(), weight="bold", size=13)
    ax.set_title("a posterior for each image")
    ax.set(xticks=[], yticks=[])

    some = [int((test.labels == label).nonzero()[3]) for label in range(9)]
    new = torch.cat([test.images[some], strangers()])
    encoded = encode(run.vje, ImageSet(new, [str(i) for i in range(len(new))]), clean)
    scorer = Scorer(run.vje, reference=load_posteriors(run, REFERENCE))
    scores = scorer.scores("aggregate", encoded)
    held_out = load_posteriors(run, CALIBRATION)
    p_values = conformal_p_values(scores, scorer.scores("aggregate", held_out))
    for ax, i in zip(right.subplots(3, 4).flat, scores.argsort().tolist(), strict=True):
        ax.imshow(new[i].float().mean(0), cmap="gray", vmin=0, vmax=255)
        ax.set_title(f"p = {p_values[i]:.3f}", color="#d55e00" if p_values[i] <= 0.05 else "black")
        ax.axis("off")
    right.suptitle("new images, from the most normal to the strangest", fontsize=10.8)
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        settings = {"embedding_dim": 32, "epochs": 20, "holdout": 0.2, "batch_size": 64, "knn_every": 0}
        main(train(TrainConfig(dataset="digits", **settings), tempfile.mkdtemp() + "/run"))
