"""Arguments of the metrics: tensors on any device and NumPy arrays alike, checked before anything is computed."""

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = Tensor | NDArray[Any]


def as_numpy(values: Array) -> NDArray[Any]:
    """``values`` as a NumPy array on the CPU; bfloat16, which NumPy lacks, becomes float32."""
    if isinstance(values, Tensor):
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)
    return np.asarray(values)


def as_vector(values: Array, name: str) -> NDArray[np.float64]:
    """``values`` as a float64 vector; ``ValueError`` if it is not one, is empty or is not finite everywhere."""
    vector = as_numpy(values).astype(np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must be a vector (N,), got shape {vector.shape}")
    if not (count := vector.size):
        raise ValueError(f"{name} is empty")
    if bad := int((~np.isfinite(vector)).sum()):
        raise ValueError(f"{bad} of the {count} values of {name} are NaN or infinite; leave those images out")
    return vector


def as_booleans(values: Array, name: str, count: int) -> NDArray[np.bool_]:
    """``values`` as a boolean vector of ``count`` entries; unlabelled images (-1) are not among them."""
    vector = as_numpy(values)
    if vector.shape != (count,) or not np.isin(vector, (0, 1)).all():
        raise ValueError(f"{name} must hold {count} booleans (or 0 and 1), got shape {vector.shape}")
    return vector.astype(bool)


def _tensor(values: Array) -> Tensor:
    """Of an array a copy: PyTorch takes no negative strides and warns of memory that it may not write to."""
    return (values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, order="C"))).detach()


def as_features(values: Array, name: str, least: int = 1) -> Tensor:
    """``values`` as a finite float32 (or float64) matrix of ``least`` rows or more, on the device where it lies."""
    features = _tensor(values)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must be a matrix (N, D), got shape {tuple(features.shape)}")
    if len(features) < least:
        raise ValueError(f"{name} has {len(features)} rows; at least {least} needed")
    if not features.isfinite().all():
        raise ValueError(f"{name} has NaN or infinite values; leave those images out")
    return features if features.dtype == torch.float64 else features.float()


def as_labels(values: Array, name: str, count: int) -> Tensor:
    """``values`` as ``count`` integer classes from 0, one for each image."""
    labels = _tensor(values)
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name} must be {count} integers, got shape {tuple(labels.shape)}, {labels.dtype}")
    if unlabelled := int((labels < 0).sum()):
        raise ValueError(f"{name} holds {unlabelled} negative labels (unlabelled images); leave them out")
    return labels.long()
