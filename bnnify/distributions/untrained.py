"""Tell a weight as an initialisation drew it from one that training has shaped."""

__all__ = ["looks_untrained"]

import math

import torch
from torch import Tensor, nn

_FEWEST = 64
"""The fewest weights from which anything can be told, if they are uniform; the bound of these tells much."""

_FEWEST_NORMAL = 4096
"""The fewest if they are normal, as many trained weights are too."""

_MOST = 512
"""The most rows and columns that are looked at."""

_CRITICAL = 1.8
"""√n times the distance between distributions that one in 300 draws would exceed (Kolmogorov and Smirnov)."""

_DEVIATIONS = 5.0
"""The standard errors by which the rows of an untrained matrix may differ more than independent numbers do."""


def looks_untrained(weight: Tensor, bias: Tensor | None = None) -> bool | None:
    """Tell whether the ``weight`` of a layer looks as initialisations leave it: all zero, or drawn independently.

    Draws are recognised if they are uniform or normal (truncated or not) with the spread that one of the usual schemes
    gives a matrix of this shape, and if neither their rows nor their columns differ in size by more than chance.
    Training makes some units larger than others, so a trained matrix fails the latter. Fewer than 4,096 normal weights
    are recognised only if their ``bias`` is all zero. On the meta device, and of a sharded weight: False.

    Returns:
        None if the weight is too small to tell: a vector, or fewer than 64 numbers that are not all zero.

    References:
        Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", eq. 16; He
        et al. 2015, "Delving Deep into Rectifiers", eq. 10: the schemes.
    """
    if weight.ndim < 2 or weight.numel() == 0:
        return None
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not weight.is_floating_point():
        return False
    if not weight.any():
        return True
    if weight.numel() < _FEWEST:
        return None
    matrix = weight.detach().flatten(1).double()
    matrix = matrix[:: math.ceil(len(matrix) / _MOST), :: math.ceil(matrix.shape[1] / _MOST)]
    values = matrix.flatten().sort().values
    fans, count = _fans(weight), len(values)
    largest, size = values.abs().max().item(), values.square().mean().sqrt().item()
    bounds = [math.sqrt(gain / fan) for gain in (1, 3, 6) for fan in fans]
    # The largest of n uniform numbers is within a few n-ths of their bound.
    if any(bound * (1 - 8 / count) < largest <= bound * (1 + 1e-3) for bound in bounds):
        fits = _distance((values / largest + 1) / 2) < _CRITICAL
    elif count >= _FEWEST_NORMAL or (bias is not None and not bias.any()):
        stds = [0.01, 0.02, *(math.sqrt(gain / fan) for gain in (1, 2) for fan in fans)]
        near = any(abs(size / (std * cut) - 1) < 4 / math.sqrt(2 * count) for std in stds for cut in (1.0, _CUT))
        whole = 0.5 * (1 + torch.erf(values / (size * math.sqrt(2))))
        within = (torch.erf(values * (_CUT / (size * math.sqrt(2)))) / math.erf(math.sqrt(2)) + 1) / 2
        fits = near and min(_distance(whole), _distance(within.clamp(0, 1))) < _CRITICAL
    else:
        fits = False
    return fits and _evenly_sized(matrix) and _evenly_sized(matrix.T)


_CUT = 0.8796
"""The standard deviation of what is left of N(0, 1) within ±2."""


def _fans(weight: Tensor) -> list[float]:
    """What a scheme may take for the number of a unit's connections: inputs, outputs, their mean, a hidden state."""
    outputs, inputs = len(weight), weight[0].numel()
    field = weight[0, 0].numel()
    return [inputs, outputs * field, (inputs + outputs * field) / 2, field, outputs, outputs / 3, outputs / 4]


def _distance(cdf: Tensor) -> float:
    """√n times the largest distance between sorted values' distribution function and the share of values below."""
    count = len(cdf)
    places = (torch.arange(count, device=cdf.device, dtype=cdf.dtype) + 0.5) / count
    return (cdf - places).abs().max().item() * math.sqrt(count)


def _evenly_sized(matrix: Tensor) -> bool:
    """Tell whether the mean squares of rows scatter as those of independent numbers do."""
    rows, columns = matrix.shape
    if rows < 2 or columns < 2:
        return True
    squares = matrix.square()
    scatter = squares.mean(1).var() / (squares.var() / columns)
    return bool((scatter - 1).abs() < _DEVIATIONS * math.sqrt((2 + 6 / columns) / (rows - 1)))
