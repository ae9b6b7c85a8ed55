"""Inception Score from sums over the images: no list of logits."""

import torch
from torch import Tensor

from ornstein.metrics.statistics import Predictions, Statistics


def inception_score(generated: Statistics) -> dict[str, float]:
    r"""Inception Score: mean over the splits of exp of the mean KL divergence from the split's marginal.

    .. math:: \mathrm{IS} = \exp \mathbb{E}_x\, \mathrm{KL}\bigl(p(y \mid x) \,\|\, p(y)\bigr)

    Between 1 and the number of classes. Image i is in split i mod S; papers cut random parts of equal size, which is
    the same in distribution. Source: Salimans et al. 2016 (arXiv 1606.03498), section 4.

    Returns: ``inception_score``, and ``inception_score_std`` (over the splits, unbiased) with more than one; empty
    without logits. Splits without images are left out.
    """
    predictions = generated.predictions
    if predictions is None:
        return {}
    filled = predictions.count > 0
    scores = _scores(predictions.total[filled], predictions.entropy[filled], predictions.count[filled])
    figures = {"inception_score": float(scores.mean())}
    if len(scores) > 1:
        figures["inception_score_std"] = float(scores.std())
    return figures


def unsplit_score(predictions: Predictions) -> float:
    """Inception Score of all images at once, whatever splits their sums are kept in."""
    total, entropy, count = (value.sum(0, keepdim=True) for value in _parts(predictions))
    return float(_scores(total, entropy, count))


def resampled_scores(logits: Tensor, weights: Tensor) -> Tensor:
    """Unsplit scores ``(R,)`` of R resamples of images with ``logits (M, K)``, taken ``weights (R, M)`` times each."""
    logp = logits.double().log_softmax(dim=1)
    p = logp.exp()
    weights = weights.to(p)
    return _scores(weights @ p, weights @ (p * logp).sum(1), weights.sum(1))


def _parts(predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
    return predictions.total, predictions.entropy, predictions.count


def _scores(total: Tensor, entropy: Tensor, count: Tensor) -> Tensor:
    marginal = total / count[:, None]
    surprise = (marginal * marginal.clamp_min(torch.finfo(torch.float64).tiny).log()).sum(1)
    return (entropy / count - surprise).exp()
