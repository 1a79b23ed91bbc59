"""
An encoder and a data set of your own
=====================================

An encoder is any ``nn.Module`` from images ``(N, 3, S, S)`` to features ``(N, F)``; a data set is a function
that returns an ``ImageSet``. Here a small vision transformer is trained on pictures that this script draws.
"""

import tempfile

import torch
from torch import nn
from torchvision.models import VisionTransformer

from pyro_vje import TrainConfig, evaluate, train
from pyro_vje.data import DATASETS, Dataset, ImageSet


# %%
# Encoders
# --------
#
# A factory takes the image size and returns the module, without its classifier. In a project of yours it lies in
# a file, and ``--encoder my_encoders:vit`` finds it from the command line.
def vit(image_size):
    network = VisionTransformer(image_size, patch_size=4, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)
    network.heads = nn.Identity()
    return network


# %%
# Data
# ----
#
# A folder of images needs no code: ``--dataset folder --data-dir photos/``. Anything else becomes one uint8
# tensor. Labels are not used in training; where there are some, :func:`pyro_vje.evaluate` can probe
# what was learned.
def gratings(request):
    generator = torch.Generator().manual_seed(int(request.split == "test"))
    labels = torch.arange(120 if request.split == "test" else 480) % 4
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, request.image_size)] * 2, indexing="ij"))
    turn = (labels * torch.pi / 4 + 0.1 * torch.randn(len(labels), generator=generator)).view(-1, 1, 1)
    phase = 6.3 * torch.rand(len(labels), 1, 1, generator=generator)
    waves = (9 * (grid[0] * turn.cos() + grid[1] * turn.sin()) + phase).sin().unsqueeze(1).expand(-1, 3, -1, -1)
    noise = torch.randn(waves.shape, generator=generator)
    images = (128 + 60 * waves + 20 * noise).clamp(0, 255).to(torch.uint8)
    names = [f"{request.split}/{i:04d}" for i in range(len(labels))]
    return ImageSet(images, names, labels, ("0°", "45°", "90°", "135°"))


DATASETS["gratings"] = Dataset(gratings, mean=(0.5,) * 3, std=(0.2,) * 3, recipe="digits", image_size=16)

# %%
# Training and a probe
# --------------------
config = TrainConfig("gratings", encoder="__main__:vit", epochs=5, batch_size=64, knn_every=0)
run = train(config, tempfile.mkdtemp() + "/run")
for row in evaluate(run, k=20, trust_plugins=True)["rows"]:
    print(f"{row['representation']:18} k-NN {row['knn']:.3f}  linear {row['linear']:.3f}")

# %%
# A transformer usually wants a lower learning rate and a longer warm-up than a ResNet; ``lr``,
# ``warmup_epochs`` and all other settings are fields of :class:`~pyro_vje.config.TrainConfig`.

# sphinx_gallery_thumbnail_path = 'images/cifar10_training.png'
