"""Estimates for the claims of section 3.3: importance by layer, epoch, class and sample.

Thresholds and sentences are in `table`; `judge` makes the verdicts.

Map: `output_importance_per_parameter`, `output_peak_epoch`, `output_late_over_early`,
`lower_layers_after_early_third`, `layer_over_others` (layers and epochs); `class_ratio` (classes);
`fraction_of_small_samples`, `share_of_top_samples`, `top_share_first_minus_output` (samples).
"""

from collections.abc import Sequence

import numpy as np

from sampimp.analysis import kernels
from sampimp.analysis.claims.evidence import (
    NO_ESTIMATE,
    Estimate,
    Evidence,
    late_over_early,
    third,
)


def output_importance_per_parameter(evidence: Evidence) -> Estimate:
    """Return the output layer's importance per parameter over the largest of the other layers.

    The ratio is the smallest of all epochs.
    """
    result = evidence.results["decomposition"]
    if "parameter_count" not in result or result.sizes["layer"] < 2:
        return NO_ESTIMATE
    count = result["parameter_count"].values

    def smallest_ratio(total: np.ndarray) -> np.ndarray:
        density = total / count
        return (density[..., -1] / density[..., :-1].max(-1)).min(-1)

    return kernels.bootstrap_sums(evidence.folds(), smallest_ratio)


def output_peak_epoch(evidence: Evidence) -> Estimate:
    """Return the epoch of the output layer's largest importance, as a fraction of all epochs."""
    folds = evidence.folds()
    epochs = folds.shape[1]
    if epochs < 3:
        return NO_ESTIMATE
    return kernels.bootstrap_sums(folds, lambda t: (t[..., -1].argmax(-1) + 1) / epochs)


def output_late_over_early(evidence: Evidence) -> Estimate:
    """Return the output layer's importance in the late third over that in the early third."""
    return late_over_early(evidence.folds(), slice(-1, None))


def lower_layers_after_early_third(evidence: Evidence) -> Estimate:
    """Return the lower layers' share of importance after the early third of the epochs.

    It is divided by the share that constant importance would have there.
    """
    folds = evidence.folds()
    epochs = folds.shape[1]
    if epochs < 3 or folds.shape[2] < 2:
        return NO_ESTIMATE
    k = third(epochs)

    def share(total: np.ndarray) -> np.ndarray:
        curve = total[..., :-1].sum(-1)
        return curve[:, k:].sum(-1) / curve.sum(-1) / (1 - k / epochs)

    return kernels.bootstrap_sums(folds, share)


def layer_over_others(
    evidence: Evidence, *, layer: int, others: Sequence[int] | None = None
) -> Estimate:
    """Return a layer's importance over the largest of other layers.

    Parameters
    ----------
    evidence
        The computed results.
    layer
        Position of the layer.
    others
        Positions of the other hidden layers. Default: all other layers, the output included.
    """
    folds = evidence.folds()
    layers = folds.shape[2]
    rest = [d for d in range(layers) if d != layer] if others is None else list(others)
    if not rest or max(layer, *rest) >= layers - (others is not None):
        return NO_ESTIMATE

    def ratio(total: np.ndarray) -> np.ndarray:
        by_layer = total.sum(1)
        return by_layer[:, layer] / by_layer[:, rest].max(-1)

    return kernels.bootstrap_sums(folds, ratio)


def class_ratio(evidence: Evidence) -> Estimate:
    """Return mean overall importance of the most important class over that of the least important.

    The two classes are chosen on every other sample, and compared on the remaining samples.
    """
    against = evidence.results["importance_against_nll"]
    tau = against["overall_importance"].values
    labels, codes = np.unique(against["label"].values, return_inverse=True)
    half = np.arange(len(tau)) % 2 == 0
    if len(labels) < 2:
        return NO_ESTIMATE
    means = []
    for part in (half, ~half):
        size = np.bincount(codes[part], minlength=len(labels))
        if (size < 2).any():
            return NO_ESTIMATE
        means.append(kernels.sum_by_group(tau[part], codes[part], len(labels)) / size)
    most, least = int(means[0].argmax()), int(means[0].argmin())
    other_tau, other_code = tau[~half], codes[~half]

    def ratio(columns: np.ndarray, weight: np.ndarray) -> float:
        total = np.bincount(other_code, weight * columns, len(labels))
        size = np.bincount(other_code, weight, len(labels))
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = total / size
            return float(mean[most] / mean[least])

    return kernels.bootstrap_samples(other_tau, ratio)


def fraction_of_small_samples(evidence: Evidence) -> Estimate:
    """Return the fraction of samples with less than half of the mean overall importance."""
    tau = evidence.results["importance_against_nll"]["overall_importance"].values

    def fraction_below(values: np.ndarray, weight: np.ndarray) -> float:
        half_mean = np.average(values, weights=weight) / 2
        return float(weight[values < half_mean].sum() / weight.sum())

    return kernels.bootstrap_samples(tau, fraction_below)


def share_of_top_samples(evidence: Evidence, *, fraction: float) -> Estimate:
    """Return the share of overall importance that the most important samples hold."""
    tau = evidence.results["importance_against_nll"]["overall_importance"].values
    return kernels.bootstrap_samples(
        tau, lambda values, weight: kernels.top_share(values, fraction, weight)
    )


def top_share_first_minus_output(evidence: Evidence) -> Estimate:
    """Return the share of the top 20 % in the first layer minus that in the output layer."""
    against = evidence.results["importance_against_nll"]
    tau = against["overall_importance"].values
    share = against["layer_share"].transpose("layer", "sample").values
    if len(share) < 2:
        return NO_ESTIMATE
    order = np.argsort(-tau, kind="stable")
    columns = (np.stack([share[0] * tau, share[-1] * tau]))[:, order]

    def difference(columns: np.ndarray, weight: np.ndarray) -> float:
        sorted_weight = weight[order]
        before = np.cumsum(sorted_weight) - sorted_weight
        taken = np.clip(0.2 * sorted_weight.sum() - before, 0, sorted_weight)
        first, last = (columns * taken).sum(-1) / (columns * sorted_weight).sum(-1)
        return float(first - last)

    return kernels.bootstrap_samples(columns, difference)
