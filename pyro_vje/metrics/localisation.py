"""How well anomaly maps tell defective pixels from normal ones, counted picture by picture in bounded memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label

LEVELS = 1 << 16
MOST_FALSE = 0.3
"""False-positive rate up to which the per-region overlap is integrated (Bergmann et al. 2019)."""


class PixelCounts:
    """How many normal and defective pixels have each of the 65,536 levels of a map, over pictures as they come.

    A defective region is a connected part of a mask, diagonally too, and its pixels count by the region's share that
    each is: a small defect weighs as much as a large one. As levels are whole numbers, nothing is approximated.
    """

    def __init__(self) -> None:
        self.normal = np.zeros(LEVELS, np.int64)
        self.defective = np.zeros(LEVELS, np.int64)
        self.overlap = np.zeros(LEVELS)
        self.regions = self.pictures = 0

    def add(self, levels: NDArray[np.uint16], mask: NDArray[np.bool_]) -> None:
        """Count a map ``(H, W)``, higher for stranger pixels, and where its picture is defective ``(H, W)``.

        Raises ``ValueError`` if the map is not of 16 bits, or the two differ in size.
        """
        if levels.dtype != np.uint16 or levels.shape != mask.shape or levels.ndim != 2:
            raise ValueError(
                f"a map of levels must be uint16 and of its mask's size {mask.shape}, not {levels.dtype} {levels.shape}"
            )
        mask = mask.astype(bool)
        self.normal += np.bincount(levels[~mask], minlength=LEVELS)
        self.defective += np.bincount(levels[mask], minlength=LEVELS)
        regions, count = label(mask, np.ones((3, 3)))
        weights = 1 / np.bincount(regions[mask], minlength=count + 1).clip(1)
        self.overlap += np.bincount(levels[mask], weights[regions[mask]], LEVELS)
        self.regions, self.pictures = self.regions + count, self.pictures + 1

    def metrics(self) -> dict[str, Any] | None:
        """AUROC, AUPRO up to `MOST_FALSE` and average precision over all pixels; nothing while one kind is missing.

        AUPRO is the area under the mean share of each region that is found, against the share of normal pixels that
        are marked, divided by `MOST_FALSE`: 1 is best, and chance is `MOST_FALSE` / 2.
        """
        if not (self.normal.any() and self.defective.any()):
            return None
        counts = np.stack([self.normal, self.defective, self.overlap])[:, ::-1]
        false, true, overlap = np.pad(counts[:, counts[:2].any(0)].cumsum(1), ((0, 0), (1, 0)))
        precision = true[1:] / (true + false)[1:]
        false, true, overlap = false / false[-1], true / true[-1], overlap / self.regions
        limit = np.interp(MOST_FALSE, false, overlap)
        inside = false <= MOST_FALSE
        x, y = np.append(false[inside], MOST_FALSE), np.append(overlap[inside], limit)
        return {
            "pictures": self.pictures,
            "regions": self.regions,
            "defective_pixels": float(self.defective.sum() / (self.defective.sum() + self.normal.sum())),
            "pixel_auroc": float(np.trapezoid(true, false)),
            "aupro_30": float(np.trapezoid(y, x) / MOST_FALSE),
            "pixel_average_precision": float((np.diff(true) * precision).sum()),
        }
