"""Exact principal components of few long rows, from their Gram matrix.

A study stores a few hundred states of up to millions of parameters. The S x S Gram matrix of the
states is summed in float64 over blocks of parameters, and its eigenvectors are the scores; the
states are never in memory together.

Map: `gram_matrix`, `principal_components`.

Shapes: S states, P parameters, K components.
"""

from collections.abc import Iterable

import numpy as np


def gram_matrix(blocks: Iterable[np.ndarray], *, columns: int = 16_384) -> np.ndarray:
    """Return the exact Gram matrix of the rows' differences from the first row, in float64.

    Differences are taken from the first row and not from the mean. A row that is not finite then
    affects its own products only, so that states of a diverged run need not be left out beforehand.

    Parameters
    ----------
    blocks : iterable of array [S, p]
        The matrix [S, P], cut along its long axis. At least one block; the first row must be
        finite.
    columns
        Number of columns that are held in float64 at once.

    Returns
    -------
    array [S, S] of float64

    Examples
    --------
    >>> gram_matrix([np.array([[1.0, 0.0], [2.0, 0.0], [1.0, np.inf]])])[:2, :2]
    array([[0., 0.],
           [0., 1.]])
    """
    total: np.ndarray | float = 0.0
    for block in blocks:
        for start in range(0, block.shape[1], columns):
            with np.errstate(invalid="ignore"):
                part = block[:, start : start + columns].astype(np.float64)
                part -= part[:1]
                total = total + part @ part.T
    return np.asarray(total)


def principal_components(
    products: np.ndarray, count: int, fit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of rows on the principal components of some of them, from a Gram matrix.

    The eigenvectors of the centred Gram matrix, scaled by the roots of its eigenvalues, are the
    scores of a PCA by singular value decomposition. The rows that are not fitted are projected on
    the same axes. The sign of each component makes its largest score positive.

    Parameters
    ----------
    products : array [S, S]
        `gram_matrix` of the rows.
    count
        K, the number of components; those beyond the rank are 0.
    fit : array [S] of bool
        The rows from which the components are computed; they must be finite.

    Returns
    -------
    scores : array [S, K]
        NaN for a row that is not finite.
    ratio : array [K]
        Share of the variance of the fitted rows.

    Examples
    --------
    >>> rows = np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [6.0, 7.0]])
    >>> fit = np.array([True, True, True, False])
    >>> scores, ratio = principal_components(gram_matrix([rows]), 1, fit)
    >>> scores.round(3).ravel().tolist(), ratio.round(3).tolist()
    ([-2.0, -1.0, 3.0, 4.0], [1.0])
    """
    core = products[np.ix_(fit, fit)]
    mean_fit = core.mean(0)
    with np.errstate(invalid="ignore"):
        cross = products[:, fit]
        cross = cross - cross.mean(1, keepdims=True) - mean_fit + mean_fit.mean()
    values, vectors = np.linalg.eigh((cross[fit] + cross[fit].T) / 2)
    order = np.argsort(values)[::-1][:count]
    total = np.trace(cross[fit])
    # An eigenvalue below 1e-12 of the variance is rounding of the double centring.
    significant = values[order] > 1e-12 * max(total, np.finfo(float).tiny)
    scale = np.where(significant, 1 / np.sqrt(np.where(significant, values[order], 1.0)), 0.0)
    scores = np.zeros((len(products), count))
    ratio = np.zeros(count)
    with np.errstate(invalid="ignore"):
        scores[:, : len(order)] = (cross @ vectors[:, order]) * scale
    ratio[: len(order)] = np.where(significant, values[order], 0.0) / total if total > 0 else 0.0
    largest = np.abs(scores[fit]).argmax(0)
    scores *= np.where(scores[fit][largest, np.arange(count)] < 0, -1.0, 1.0)
    return scores, ratio
