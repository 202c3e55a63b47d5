"""How steep activations are: the largest |act′(h)| over all h."""

ACTIVATION_SLOPES = {
    # GELU″(h) = φ(h) (2 − h²) is 0 at h = √2: ½ (1 + erf 1) + 1 / (e √π)
    "gelu": 1.1289041452,
    # at h = 1.41850 …, by Newton's method in 30 digits
    "gelu_tanh": 1.1289930687,
    # σ(h) (1 + h (1 − σ(h))) where h tanh(h / 2) = 2, h = 2.39935 …
    "silu": 1.0998393202,
    # SiLU(1.702 h) / 1.702
    "quick_gelu": 1.0998393202,
    "relu": 1.0,
}
"""Name in ``ironmoe.kernels.ACTIVATIONS`` → the largest absolute slope, rounded up in the tenth
digit. Gated activations and the square of ReLU have none: they grow with their input."""


def activation_slope(name: str) -> float:
    """The largest slope of an activation. ValueError: it has none, or it is not known."""
    if name not in ACTIVATION_SLOPES:
        raise ValueError(
            f"activation must be one of {tuple(ACTIVATION_SLOPES)}, whose slopes are bounded, got "
            f"{name!r}"
        )
    return ACTIVATION_SLOPES[name]
