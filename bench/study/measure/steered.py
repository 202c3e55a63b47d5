"""What a model says when it is steered, beside what it says by itself."""

from torch import Tensor

from ironmoe.bench.study.measure.measurement import Outcome, numbers


def steered(key: str, logits: Tensor, own: Tensor, labels: Tensor) -> Outcome:
    """Of the same images: accuracy "key"; "key:changed", the share of predictions that steering
    changes; "key:kl", the mean divergence of ``divergence``. Per image whether it is right.

    logits, own (N, C): with and without steering; labels (N,).
    """
    right = (logits.argmax(1) == labels).double()
    changed = (logits.argmax(1) != own.argmax(1)).double()
    return Outcome(
        {
            key: float(right.mean()),
            f"{key}:changed": float(changed.mean()),
            f"{key}:kl": float(divergence(own, logits).mean()),
        },
        {key: numbers(right)},
    )


def divergence(own: Tensor, other: Tensor) -> Tensor:
    """(N,) KL(own ‖ other) in nats, of the probabilities of these logits (N, C)."""
    p, q = (logits.double().log_softmax(1) for logits in (own, other))
    return (p.exp() * (p - q)).sum(1)
