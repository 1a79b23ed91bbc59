"""Places of images: their features, from an encoder's middle stages in the same pass, and the density of these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, normalize, softplus

from pyro_vje.model.vje import MIN_SCALE, VJE

KINDS = 16
"""Scales that the kernels of a density share: a scale for each kernel doubles the time, and finds no more."""
GROUP = 32
"""Kernels of which the densest alone counts: the sum of all would take two fifths longer."""
_EXTRA_TOKENS = (0, 1, 2, 5)  # of a transformer beside its patches: class, distillation, registers


class PlaceFeatures:
    """Features ``(N, h, w, C)`` at h × w places of images, of one encoder, and the pooled ones ``(N, F)`` with them.

    ``modules`` names parts of the encoder; by default the last blocks at the last but two and last but one of its
    resolutions (a stride of 8 and 16 of most networks), or of a transformer those at half and three quarters of its
    depth. Each output is averaged over 3 × 3 neighbours (as PatchCore does: Roth et al. 2022), brought to the coarsest
    resolution among them and normalised, so that each module counts alike. ``ValueError``: a module is unknown, or
    there is none whose outputs have places.
    """

    def __init__(self, encoder: nn.Module, image_size: int, modules: Sequence[str] = ()) -> None:
        self.encoder = encoder
        parameter = next(encoder.parameters(), torch.empty(0))
        image = torch.zeros(1, 3, image_size, image_size, device=parameter.device)
        known = dict(encoder.named_modules())
        if unknown := [name for name in modules if name not in known]:
            raise ValueError(f"the encoder ({type(encoder).__name__}) has no module {', '.join(unknown)}")
        with torch.no_grad():
            found, _ = self._run(image, [name for name in known if name])
            sides = {name: side for name, output in found.items() if (side := _grid(output).shape[-1]) > 1}
            self.modules = [*modules] or _middle(encoder, sides)
            lost = [name for name in self.modules if name not in sides]
            if lost or not self.modules:
                which = f"its module {lost[0]} gives no" if lost else "none of its modules gives"
                raise ValueError(
                    f"the encoder ({type(encoder).__name__}) has no features at places, which maps need: for images of "
                    f"{image_size} pixels {which} maps (N, C, h, h) or a square grid of tokens"
                )
            self.side = min(sides[name] for name in self.modules)
            self.dim = self(image)[1].shape[-1]

    def _run(self, images: Tensor, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            # In the order in which they end; a module that runs twice is kept as it was last.
            return lambda module, inputs, output: found.update({name: output}) if _is_map(output) else None

        handles = [self.encoder.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        try:
            return found, self.encoder(images)
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features ``(N, F)`` and features at places ``(N, h, w, C)`` of normalised images, in one pass."""
        found, features = self._run(images, self.modules)
        stages = []
        for name in self.modules:
            output = avg_pool2d(_grid(found[name]).float(), 3, 1, 1, count_include_pad=False)
            stages.append(normalize(adaptive_avg_pool2d(output, self.side), dim=1))
        return features.float(), torch.cat(stages, 1).movedim(1, -1)


def share_scales(scale: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Scales ``(K, D)``, at most `KINDS`, in place of those of R kernels ``(R, D)``, and which is whose, ``(R,)``.

    They are geometric means of scales that are alike (k-means of their logarithms).
    """
    kinds = max(1, min(KINDS, len(scale) // GROUP))
    found = KMeans(kinds, n_init=1, random_state=seed % 2**32).fit(scale.log().cpu().numpy())
    return torch.from_numpy(found.cluster_centers_).exp(), torch.from_numpy(found.labels_).long()


class PlaceDensity:
    """The density of places under a head's kernels, at most log `GROUP` nats too low: of each group the densest counts.

    Kernels are at the embeddings ``reference`` ``(R, D)``, and have one of the scales ``scale`` ``(K, D)``, as ``kind``
    ``(R,)`` says.
    """

    def __init__(self, head: VJE, reference: Tensor, scale: Tensor, kind: Tensor) -> None:
        self.head, self.count = head, len(reference)
        df, dim = head.settings.df, reference.shape[1]
        self._group = GROUP if len(reference) >= GROUP**2 else 1
        self._width = (softplus(head.raw_radius_scale) + MIN_SCALE).item() * math.sqrt(df)  # type: ignore[arg-type]
        self._n = (df + dim) / 2
        kinds = kind.unique()
        scale = scale[kinds].to(head.device)
        self._precision = head.settings.unit_radius**2 / df / scale.square()
        self._kernels, log_scale = [], []
        for k, shared, precision in zip(kinds, scale.log().sum(-1), self._precision, strict=True):
            e = reference[kind == k].to(head.device)
            # Whole groups: the same kernel twice in one is the densest once.
            e = torch.cat([e, e[-1:].expand(-len(e) % self._group, -1)])
            mean = normalize(e)
            direction = torch.stack([torch.ones(len(e), device=e.device), 1 + mean.square() @ precision])
            direction = torch.cat([-2 * (mean * precision).T, direction])
            self._kernels.append((direction, e.norm(dim=-1) / self._width))
            log_scale.append(shared.expand(len(e) // self._group))
        self._log_scale = torch.cat(log_scale)

    @torch.no_grad()
    def __call__(self, places: Tensor) -> Tensor:
        """-log of the density of places ``(N, h, w, C)``, in nats up to a constant, ``(N, h, w)``."""
        found = []
        for image in places.flatten(1, 2).to(self.head.device):  # one at a time, which stays in a CPU's cache
            t = self.head.project(image)
            radius = t.norm(dim=-1, keepdim=True)
            u, one, nearest = t / radius, torch.ones_like(radius), []
            inputs = torch.cat([u, one, one], 1)
            for spread, (direction, radii) in zip(self._precision @ u.square().T, self._kernels, strict=True):
                # With the D - 2 degrees of freedom of such a head, the factor of the direction is the power -n of what
                # is linear in (u, Σ u²/v, 1), that of the radius the power -n / 2 of what is quadratic. The power
                # is taken of the densest kernels alone.
                inputs[:, -2] = spread
                far = (inputs @ direction).square_()
                far.addcmul_(far, (radius / self._width - radii).square_())
                nearest.append(far.unflatten(1, (-1, self._group)).amin(-1))
            log_kernels = -self._n / 2 * torch.cat(nearest, 1).log() - self._log_scale
            most = log_kernels.amax(1, keepdim=True)
            # Less than e^-80 of the densest does not count, and its exponential would be a denormal, which takes long.
            log_sum = most[:, 0] + (log_kernels - most).clamp_min_(-80).exp_().sum(1).log()
            found.append((t.shape[1] - 1) * radius[:, 0].log() - log_sum + math.log(self.count))
        return torch.stack(found).unflatten(1, places.shape[1:3]).float()


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() in (3, 4) and _grid(output).shape[-1] > 0


def _grid(output: Tensor) -> Tensor:
    """An output as ``(N, C, h, h)``: maps, channels last or not, or the tokens of a transformer; else h is 0."""
    if output.dim() == 4 and output.shape[2] == output.shape[3]:
        return output
    if output.dim() == 4 and output.shape[1] == output.shape[2]:
        return output.movedim(-1, 1)
    if output.dim() == 3:
        tokens = output.shape[1]
        for extra in _EXTRA_TOKENS:
            if (side := math.isqrt(tokens - extra)) ** 2 == tokens - extra and side > 1:
                return output[:, extra:].transpose(1, 2).unflatten(2, (side, side))
    return output.new_empty(len(output), 0, 0, 0)


def _middle(encoder: nn.Module, sides: dict[str, int]) -> list[str]:
    """Names of the modules in the middle of an encoder, of those with places, whose ``sides`` are in their order."""
    resolutions = sorted(set(sides.values()), reverse=True)
    if len(resolutions) == 1:  # a transformer: its blocks are the most numerous children of one module
        siblings: dict[str, list[str]] = {}
        for name in sides:
            parent = name.rpartition(".")[0]
            if isinstance(encoder.get_submodule(parent), nn.Sequential | nn.ModuleList):
                siblings.setdefault(parent, []).append(name)
        blocks = max(siblings.values(), key=len, default=list(sides))
        return sorted({blocks[(len(blocks) - 1) * k // 4] for k in (2, 3)}, key=blocks.index)
    chosen = []
    for side in resolutions[-3:-1]:
        names = [name for name in sides if sides[name] == side]
        least = min(name.count(".") for name in names)  # whole stages, not what is within one
        chosen.append([name for name in names if name.count(".") == least][-1])
    return chosen
