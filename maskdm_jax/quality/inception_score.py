"""The Inception Score (Salimans et al. 2016, "Improved Techniques for Training GANs").

exp(E KL(p(class | image) || p(class))): high if each image has a clear class and all classes occur
equally often. It compares with no reference, so it says little about sets without ImageNet's
classes, such as faces.
"""

import numpy as np

NUM_SPLITS = 10


def inception_score(logits_NK: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean and standard deviation of the score over NUM_SPLITS parts of the images.

    Args:
      logits_NK: the network's "logits" [N, 1008], N >= NUM_SPLITS.
      seed: of the order before splitting: sets are often sorted by class.
    """
    logits = np.random.default_rng(seed).permutation(np.asarray(logits_NK, np.float64))
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(log_p, NUM_SPLITS):
        p = np.exp(part)
        divergence = (p * part).sum(axis=1) - p @ np.log(p.mean(axis=0))
        scores.append(np.exp(divergence.mean()))
    return {
        "inception_score": float(np.mean(scores)),
        "inception_score_std": float(np.std(scores)),
    }
