"""Linear classification on frozen features."""

from __future__ import annotations

import warnings

from torch import Tensor

from .features import check_finite


def linear_top1(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    C: float = 1.0,
    max_iter: int = 200,
    labeled: Tensor | slice = slice(None),
    per_feature: bool = True,
) -> float:
    """Top-1 accuracy in percent of multinomial logistic regression on standardized features.

    The official linear protocol trains the same classifier by SGD, with a learning rate found by search (30 for
    ResNet-50 on ImageNet). On features that fit in memory, L-BFGS solves this convex problem without tuning, so every
    representation gets the same classifier and the same L2 penalty.

    Args:
        train_features: [N, D]; each feature is standardized by its mean and deviation over the training set.
        train_labels: int64 [N].
        C: inverse strength of the L2 penalty, as in scikit-learn's ``LogisticRegression``.
        max_iter: L-BFGS iterations; reaching the limit is early stopping, not an error.
        labeled: indices of the training images whose labels are used, by default all. The others only standardize.
        per_feature: False: divide all features by one deviation, the root mean square of theirs, which keeps their
            relative scales.

    Raises:
        ValueError: features are not finite.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    check_finite("train_features", train_features)
    check_finite("test_features", test_features)
    mean, std = train_features.mean(0), train_features.std(0)
    if not per_feature:
        std = std.square().mean().sqrt().expand_as(std)
    constant = std <= 1e-6 * train_features.abs().amax(0)  # up to rounding, which must not be scaled up
    std = std.masked_fill(constant, float("inf"))
    classifier = LogisticRegression(C=C, max_iter=max_iter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(((train_features[labeled] - mean) / std).numpy(), train_labels[labeled].numpy())
    return 100 * float(classifier.score(((test_features - mean) / std).numpy(), test_labels.numpy()))
