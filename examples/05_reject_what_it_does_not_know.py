"""
Reading the uncertainty
=======================

A model that says when it does not know is worth more than one that guesses. Here the digits that a model finds
strange are not classified, and what that buys is measured. Not every number that looks like an uncertainty is
one.
"""

import dataclasses
import tempfile

import matplotlib.pyplot as plt
import torch

from pyro_vje import TrainConfig, load_run, train
from pyro_vje.calibration import conformal_p_values
from pyro_vje.data import load_dataset
from pyro_vje.encoding import encode
from pyro_vje.metrics import knn_predict, r_auroc, rejection_curve
from pyro_vje.runs import CALIBRATION, load_posteriors
from pyro_vje.scorer import Scorer

config = TrainConfig(dataset="digits", epochs=8, holdout=0.1, knn_every=0)
run = load_run(train(config, tempfile.mkdtemp() + "/run"))

# %%
# A hard test
# -----------
#
# Half of the test images are spoiled by a black bar. Each image takes the class of its nearest training image.
known, test = load_dataset("digits", split="train"), load_dataset("digits", split="test")
spoiled = test.images.clone()
spoiled[::2, :, :, 4:9] = 0
images = dataclasses.replace(test, images=spoiled)
train_features = encode(run.vje, known, run.info.view).features
encoded = encode(run.vje, images, run.info.view)
correct = knn_predict(train_features, known.labels, encoded.features, k=1) == test.labels
whole, spoilt = correct[1::2].double().mean(), correct[::2].double().mean()
print(f"accuracy on whole digits {whole:.3f}, on spoiled ones {spoilt:.3f}")

# %%
# Which number knows?
# -------------------
#
# R-AUROC is the chance that a wrong answer has a higher uncertainty than a right one: 0.5 is no better than a
# coin, and below it the number points the wrong way. Measure it on data of yours before relying on any of them.
scorer = Scorer(run.vje)
figure, ax = plt.subplots(figsize=(6, 4))
for name in ("direction", "conditional", "variance"):
    uncertainty = scorer.scores(name, encoded.posteriors)
    curve = rejection_curve(correct, uncertainty)
    ax.plot(curve.rejected, curve.accuracy, label=f"{name}, R-AUROC {r_auroc(correct, uncertainty):.2f}")
ax.set(xlabel="share of the images rejected", ylabel="accuracy on the others", xlim=(0, 0.9))
ax.legend()

# %%
# A threshold that means something
# --------------------------------
#
# The held-out images turn a score into a p-value: of images like the training ones a tenth is rejected at 0.1,
# whatever the score. That more of the spoiled ones are rejected, and more of the wrong answers, is the score's
# merit.
held_out = scorer.scores("direction", load_posteriors(run, CALIBRATION))
p_values = torch.from_numpy(conformal_p_values(scorer.scores("direction", encoded.posteriors), held_out))
kept = p_values > 0.1
whole, spoilt = (~kept)[1::2].double().mean(), (~kept)[::2].double().mean()
print(f"rejected: {whole:.2f} of the whole digits, {spoilt:.2f} of the spoiled")
print(f"accuracy on all {correct.double().mean():.3f}, on what is kept {correct[kept].double().mean():.3f}")
