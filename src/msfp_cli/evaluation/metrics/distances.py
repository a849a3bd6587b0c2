"""How far pictures, and sets of pictures, are from each other.

Against the same picture by full precision: peak signal-to-noise ratio and structural similarity.
Against a set of pictures, by the features of some extractor: Fréchet distance, kernel distance,
precision and recall. Sums are in float64: a Fréchet distance is a small difference of large traces.
"""

import torch
from torch import Tensor

from msfp_cli.errors import UsageError

SSIM_WINDOW = 11  # pixels
NEIGHBOURS = 3  # of a point, for precision and recall


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each picture, ``-10 log10(MSE)``, in dB.

    Arguments:
        pictures, reference: ``(pictures, channels, height, width)`` in 0..1.

    Returns:
        float64 ``(pictures,)``; infinite where the two are equal.

    Raises:
        UsageError: the two have different shapes.
    """
    _refuse_other_shapes(pictures, reference)
    error = (pictures.double() - reference.double()).square().flatten(1).mean(dim=1)
    return -10 * error.log10()


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Return the structural similarity of each picture (Wang et al. 2004), by windows of 11 by 11.

    Arguments:
        pictures, reference: ``(pictures, channels, height, width)`` in 0..1, at least 11 by 11.

    Returns:
        float64 ``(pictures,)``, 1 where the two are equal.

    Raises:
        UsageError: the two have different shapes, or are smaller than the window.
    """
    _refuse_other_shapes(pictures, reference)
    if min(pictures.shape[-2:]) < SSIM_WINDOW:
        raise UsageError(
            "structural similarity needs pictures of at least 11 by 11, "
            f"not {tuple(pictures.shape[-2:])}"
        )
    x = pictures.double()
    y = reference.double()
    mean_x = _local_mean(x)
    mean_y = _local_mean(y)
    var_x = _local_mean(x * x) - mean_x**2
    var_y = _local_mean(y * y) - mean_y**2
    covariance = _local_mean(x * y) - mean_x * mean_y
    c1 = 0.01**2  # the constants of the paper
    c2 = 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_y + c2)).flatten(1).mean(dim=1)


def _local_mean(values: Tensor) -> Tensor:
    """Return the mean in a Gaussian window (deviation 1.5 pixels) at every place where it fits."""
    places = torch.arange(-5, 6, dtype=torch.float64, device=values.device)
    bell = torch.exp(-(places**2) / (2 * 1.5**2))
    window = torch.outer(bell, bell) / bell.sum() ** 2
    flat = values.flatten(0, 1).unsqueeze(1)
    return torch.nn.functional.conv2d(flat, window[None, None]).view(*values.shape[:2], -1)


def _refuse_other_shapes(pictures: Tensor, reference: Tensor) -> None:
    if pictures.shape != reference.shape:
        raise UsageError(
            f"cannot compare pictures of shape {tuple(pictures.shape)} "
            f"with {tuple(reference.shape)}; both need the same number and size"
        )


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Return the Fréchet distance of two sets of features (Heusel et al. 2017, arXiv:1706.08500).

    Both sets are taken to be Gaussian, with means m1, m2 and covariances C1, C2:
    ``|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))``. The last trace is the sum of the square
    roots of the eigenvalues of ``C1^(1/2) C2 C1^(1/2)``, which is symmetric.

    Arguments:
        features, reference: ``(samples, dimensions)``; with fewer samples than dimensions the
            distance is biased upwards (see `too_few`).

    Raises:
        UsageError: a set has fewer than two samples, or the dimensions differ.
    """
    samples, points = _pair(features, reference)
    mean1, cov1 = _moments(samples)
    mean2, cov2 = _moments(points)
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.t()
    mixed = torch.linalg.eigvalsh(root @ cov2 @ root).clamp_min(0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * mixed
    return max(0.0, float(distance))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance."""
    dimensions = features.shape[1]
    return features.mean(dim=0), torch.cov(features.t()).reshape(dimensions, dimensions)


def _pair(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets in float64."""
    if features.shape[1] != reference.shape[1]:
        raise UsageError(
            f"cannot compare features of {features.shape[1]} and {reference.shape[1]} dimensions; "
            "use one extractor for both"
        )
    if min(len(features), len(reference)) < 2:
        raise UsageError("a distance of distributions needs at least two pictures on either side")
    return features.double(), reference.double()


def too_few(samples: int, dimensions: int) -> bool:
    """Whether a Fréchet distance depends more on the number of samples than on their quality."""
    return samples < 2 * dimensions


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """Return the kernel distance: unbiased squared MMD, kernel ``(x y / d + 1)^3``.

    Known as KID for Inception features (Bińkowski et al. 2018, arXiv:1801.01401).

    It is computed over all pairs at once, so it needs no random subsets. It is unbiased, so it is
    around 0, and possibly below, for equal distributions.

    Arguments:
        features, reference: ``(samples, dimensions)``.

    Raises:
        UsageError: as in `frechet_distance`.
    """
    x, y = _pair(features, reference)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.t() / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        products = kernel(a, a)
        return (products.sum() - products.trace()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def precision(features: Tensor, reference: Tensor) -> float:
    """Return the share of samples near the reference (Kynkäänniemi et al. 2019, arXiv:1904.06991).

    A point is near a set if, for some point of the set, it is not farther away than that point's
    third neighbour in the set.

    Arguments:
        features, reference: ``(samples, dimensions)``.

    Raises:
        UsageError: as in `frechet_distance`, or a set has no more than three points.
    """
    samples, points = _pair(features, reference)
    if min(len(samples), len(points)) <= NEIGHBOURS:
        raise UsageError(
            f"precision and recall need more than {NEIGHBOURS} pictures on either side"
        )
    radius = torch.cdist(points, points).kthvalue(NEIGHBOURS + 1, dim=1).values
    return float((torch.cdist(samples, points) <= radius).any(dim=1).double().mean())


def recall(features: Tensor, reference: Tensor) -> float:
    """Return the share of the reference near the samples: `precision` with the sets exchanged."""
    return precision(reference, features)
