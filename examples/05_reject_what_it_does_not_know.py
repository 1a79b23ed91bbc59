"""
Reading the uncertainty
=======================

A classifier that says when it does not know is worth more than one that guesses. Here the digits that a model finds
strange are not classified, and what that buys is measured. Not every number that looks like an uncertainty is one.
"""

import tempfile

import matplotlib.pyplot as plt
import torch

from pyro_vje import TrainConfig, load_run, train
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.data import load_dataset
from pyro_vje.metrics import conformal_p_values, knn_predict, r_auroc, rejection_curve
from pyro_vje.model.encoding import encode
from pyro_vje.runs.folder import CALIBRATION, load_posteriors

config = TrainConfig("digits", epochs=8, holdout=0.1, knn_every=0)
run = load_run(train(config, tempfile.mkdtemp() + "/run"))

# %%
# Right and wrong answers
# -----------------------
#
# Each test image takes the class of the training image nearest to it in the encoder's features.
known, test = load_dataset("digits", split="train"), load_dataset("digits", split="test")
encoded = encode(run.vje, test, run.info.view)
predicted = knn_predict(encode(run.vje, known, run.info.view).features, known.labels, encoded.features, k=1)
correct = predicted == test.labels

# %%
# Which number knows?
# -------------------
#
# R-AUROC is the chance that a wrong answer has a higher uncertainty than a right one: 0.5 is no better than a coin,
# and below it the number points the wrong way. Here the likelihood's directional factor knows something; the
# variance of the posterior, which looks like an uncertainty, knows nothing. Measure each on data of yours before
# relying on any of them; ``pyro-vje eval`` does for the variance.
scorer = Scorer(run.vje)
figure, ax = plt.subplots(figsize=(6, 4))
for name in ("direction", "conditional", "variance"):
    uncertainty = scorer.scores(name, encoded)
    curve = rejection_curve(correct, uncertainty)
    ax.plot(curve.rejected, curve.accuracy, label=f"{name}, R-AUROC {r_auroc(correct, uncertainty):.2f}")
ax.set(xlabel="share of the images rejected", ylabel="accuracy on the others", xlim=(0, 0.9))
ax.legend()

# %%
# A threshold that means something
# --------------------------------
#
# The held-out images turn a score into a p-value: of images like the training ones a tenth is rejected at 0.1,
# whatever the score. That wrong answers are rejected more often than right ones is the score's merit.
held_out = scorer.scores("direction", load_posteriors(run, CALIBRATION))
p_values = torch.from_numpy(conformal_p_values(scorer.scores("direction", encoded), held_out))
kept = p_values > 0.1
right, wrong = (~kept)[correct].double().mean(), (~kept)[~correct].double().mean()
print(f"rejected: {right:.2f} of the right answers, {wrong:.2f} of the wrong ones")
print(f"accuracy on all {correct.double().mean():.3f}, on what is kept {correct[kept].double().mean():.3f}")
