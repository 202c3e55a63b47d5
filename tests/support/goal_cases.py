"""Goals with a model and labels that suit them, for tests that try them all.

Models are small and in float64, and share the images of ``conformance``: (14, 1, 4, 4).
"""

from typing import NamedTuple

import conformance
import torch
from torch import nn

from ironmoe.attacks import (
    ClassSet,
    Confident,
    Custom,
    EmbeddingDistance,
    MultiLabel,
    Regression,
    Segmentation,
    Superclass,
    TopK,
)

OUTPUTS = 12


class GoalCase(NamedTuple):
    """A goal, the shape of an output, and how labels are made of clean outputs."""

    goal: object
    shape: tuple
    labels_of: object

    def model(self, dtype=torch.float64):
        return Shaped(self.shape).to(dtype)

    def labels(self, outputs):
        """Where the goal is to leave the labels, they are what the model says, but for one image
        which has reached the goal from the start."""
        labels = self.labels_of(outputs)
        if not self.goal.targeted:
            other = self.labels_of(outputs.flip(1))
            if len(labels):
                labels[0] = other[0]
        return labels

    def __str__(self):
        return str(self.goal)


class Shaped(nn.Module):
    """A network with outputs (N, *shape)."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        self.shape = shape
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, OUTPUTS)
        )

    def forward(self, x):
        return 12 * self.layers(x).unflatten(1, self.shape)


def classes(outputs):
    return outputs.argmax(1)


def third_classes(outputs):
    return outputs.topk(3).indices[:, 2]


def class_sets(outputs):
    return outputs >= outputs.topk(1).values


def other_sets(outputs):
    return ~class_sets(outputs) & (outputs >= outputs.topk(3).values[:, 2:])


def label_sets(outputs):
    return (outputs > 0).long()


def other_label_sets(outputs):
    labels = label_sets(outputs)
    places = outputs.abs().argmin(1, keepdim=True)
    return labels.scatter(1, places, 1 - labels.gather(1, places))


def second_classes(outputs):
    return outputs.topk(2, 1).indices[:, 1]


def numbers(outputs):
    return outputs.clone()


def near_numbers(outputs):
    return outputs + 0.2


def sum_above(outputs, labels):
    return outputs.sum(1) - labels.sum(1) - 0.5


def is_above(outputs, labels):
    return sum_above(outputs, labels) > 0


FLAT = (OUTPUTS,)
MAPS = (3, 2, 2)
OF = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]

CASES = [
    GoalCase(TopK(1), FLAT, classes),
    GoalCase(TopK(2), FLAT, second_classes),
    GoalCase(TopK(2, targeted=True), FLAT, third_classes),
    GoalCase(Confident(0.02), FLAT, classes),
    GoalCase(Confident(0.02, targeted=True), FLAT, second_classes),
    GoalCase(Superclass(OF), FLAT, classes),
    GoalCase(Superclass(OF, targeted=True), FLAT, second_classes),
    GoalCase(ClassSet(), FLAT, class_sets),
    GoalCase(ClassSet(targeted=True), FLAT, other_sets),
    GoalCase(MultiLabel(), FLAT, label_sets),
    GoalCase(MultiLabel(wrong=2), FLAT, label_sets),
    GoalCase(MultiLabel(jaccard=0.9), FLAT, label_sets),
    GoalCase(MultiLabel(targeted=True), FLAT, other_label_sets),
    GoalCase(Segmentation(0.8), MAPS, classes),
    GoalCase(Segmentation(0.5), MAPS, classes),
    GoalCase(Segmentation(0.75, ignore_index=2), MAPS, classes),
    GoalCase(Segmentation(0.25, targeted=True), MAPS, second_classes),
    GoalCase(Regression(0.3), FLAT, numbers),
    GoalCase(Regression(0.15, measure="mean"), FLAT, numbers),
    GoalCase(Regression(0.5, measure="l2", targeted=True), FLAT, near_numbers),
    GoalCase(EmbeddingDistance(0.003), FLAT, numbers),
    GoalCase(EmbeddingDistance(0.5, metric="l2"), FLAT, numbers),
    GoalCase(EmbeddingDistance(0.005, targeted=True), FLAT, near_numbers),
    GoalCase(Custom(is_above, loss={"margin": sum_above}, figure=sum_above), FLAT, numbers),
    GoalCase(Custom(is_above, loss=sum_above), FLAT, numbers),
    GoalCase(Custom(is_above, name="no loss"), FLAT, numbers),
]


# Of an attack that takes long, less is enough to see it at work.
SHORT = {"hopskipjump": {"initial_probes": 8, "max_probes": 16, "start_tries": 20}}


def attacks():
    """Every registered attack once, in its first norm, without losses of its own."""
    found = conformance.one_norm_each(conformance.cases())
    return [
        case._replace(
            settings={k: v for k, v in case.settings.items() if k != "loss"}
            | SHORT.get(case.name, {})
        )
        for case in found
    ]
