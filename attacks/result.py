"""The result of one attack on one batch."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(repr=False)
class AttackResult:
    """What an attack did to N examples. Every field is a tensor with N entries on the images'
    device.

    adversarial:   (N, …) float32 (float64 for float64 images); the clean image where it was
                   misclassified already (but see PGD.vmoe)
    clean_correct: bool; the clean image is classified as its label (a targeted attack: not as its
                   target)
    success:       bool; clean_correct, and the final image was predicted again in full precision,
                   as another class (a targeted attack: as its target), at a distance ≤ eps
    prediction:    int64; the class of the final image
    distance:      float64; distance of the final image in the attack's norm
    steps:         int64; how many queries came before the first success, 0 if the starting point
                   was one; −1 without success
    found:         bool; the search saw a success. The prediction may not have confirmed it, where
                   the search runs in low precision or on another model than the one that predicts,
                   or where a model is random
    forwards:      int64; forward passes of the model that this example took part in
    backwards:     int64; backward passes
    clean_figure:  float64; the goal's figure for the clean image; NaN if the goal has none
    figure:        float64; the goal's figure for the final image
    passes:        how often the model was asked for each prediction that counts
    hits:          int64 (N, 2, 2) for a random model, else (N, 0, 2): how many of its passes over
                   the clean image, and over the best adversarial point, reached the goal, in the
                   first and in the second half of the passes; the best is chosen by the first, so
                   the second half is a fair measure of it
    flags:         name → bool (N,): "zero_gradient", the first gradient of an attempt was 0
                   everywhere; "loss_rising", the loss was still rising when an unsuccessful attempt
                   ended
    """

    adversarial: Tensor
    clean_correct: Tensor
    success: Tensor
    prediction: Tensor
    distance: Tensor
    steps: Tensor
    found: Tensor
    forwards: Tensor
    backwards: Tensor
    flags: dict[str, Tensor]
    clean_figure: Tensor
    figure: Tensor
    passes: int
    hits: Tensor

    @property
    def robust(self) -> Tensor:
        """bool (N,): classified right, and no adversarial example was found."""
        return self.clean_correct & ~self.success

    def with_passes_of(self, earlier: "AttackResult") -> "AttackResult":
        """The result, with the passes that an earlier run spent added to its own."""
        return replace(
            self,
            forwards=self.forwards + earlier.forwards,
            backwards=self.backwards + earlier.backwards,
        )

    def __repr__(self) -> str:
        """What to read first, in place of all the tensors."""
        right = int(self.clean_correct.sum())
        return (
            f"AttackResult({len(self.success)} images, {right} of them to attack, "
            f"{int(self.success.sum())} successes)"
        )
