"""Linear classification on frozen features."""

from __future__ import annotations

import warnings

from torch import Tensor


def linear_top1(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    C: float = 1.0,
    max_iter: int = 200,
) -> float:
    """Top-1 accuracy in percent of multinomial logistic regression on standardised features.

    The published probe trains the same linear classifier by SGD with a learning rate searched for (30 for
    ResNet-50 on ImageNet). On features that fit in memory the problem is convex and L-BFGS simply solves it,
    with nothing to tune: every representation gets the same classifier and the same L2 penalty.

    Args:
        train_features: [N, D]; standardised per feature with the training set's mean and deviation.
        train_labels: int64 [N].
        C: inverse strength of the L2 penalty, as scikit-learn's ``LogisticRegression``.
        max_iter: L-BFGS iterations; stopping there is a form of early stopping, no error.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, std = train_features.mean(0), train_features.std(0)
    constant = std <= 1e-6 * train_features.abs().amax(0)  # rounding apart: says nothing, and must not be blown up
    std = std.masked_fill(constant, float("inf"))
    classifier = LogisticRegression(C=C, max_iter=max_iter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(((train_features - mean) / std).numpy(), train_labels.numpy())
    return 100 * float(classifier.score(((test_features - mean) / std).numpy(), test_labels.numpy()))
