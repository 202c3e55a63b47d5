"""The layers whose cost is computed, and the ranks that they are spread over."""

from typing import NamedTuple

from ironmoe.bench.benchmarks.shapes import SHAPES, Shape

BFLOAT16 = 2  # bytes


class Layer(NamedTuple):
    """One MoE layer as one rank sees it.

    shape: its sizes, with the tokens of one rank; shared: hidden width of the experts that every
    token takes, together; repeats: how many such layers the model has; itemsize: bytes of a number
    of a row.
    """

    shape: Shape
    shared: int = 0
    repeats: int = 1
    itemsize: int = BFLOAT16

    @property
    def expert_numbers(self) -> int:
        """Parameters of all E experts."""
        shape = self.shape
        weights = shape.dim * (shape.wide + shape.hidden)
        return shape.num_experts * (weights + (shape.wide + shape.dim) * shape.bias)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on its way."""
        return self.shape.dim * self.itemsize

    def with_tokens(self, tokens: int) -> "Layer":
        return self._replace(shape=self.shape._replace(tokens=tokens))

    def with_experts(self, num_experts: int) -> "Layer":
        return self._replace(shape=self.shape._replace(num_experts=num_experts))


class World(NamedTuple):
    """ranks: one expert-parallel group, one GPU each; node: how many GPUs a node has; imbalance:
    the rows of the rank that receives most, divided by the mean of all ranks."""

    ranks: int
    node: int = 8
    imbalance: float = 1.0

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.node)

    @property
    def leaves_rank(self) -> float:
        """The share of a rank's rows that go to other ranks, where every rank gets as many."""
        return (self.ranks - 1) / self.ranks

    @property
    def leaves_node(self) -> float:
        """The share that goes to other nodes."""
        return (self.ranks - min(self.node, self.ranks)) / self.ranks

    @property
    def busiest(self) -> float:
        """The imbalance that is possible: one rank cannot get more than all rows."""
        return min(self.imbalance, float(self.ranks))


# A layer of DeepSeek-V3 (arXiv 2412.19437, section 4.2): 58 of 61 layers have experts. 4096 tokens
# are one sequence of its pre-training.
DEEPSEEK = Layer(Shape("deepseek-v3", 4096, 7168, 2048, 256, 8), shared=2048, repeats=58)
_VISION = {shape.name: shape for shape in SHAPES if shape.name.startswith("vmoe-")}
LAYERS = (
    Layer(_VISION["vmoe-l16-e32"], repeats=12),  # every second of 24 blocks
    Layer(_VISION["vmoe-h14-e32"], repeats=16),  # every second of 32
    DEEPSEEK,
)
KNOWN = (*SHAPES, DEEPSEEK.shape)


def layers_of(
    shapes: tuple[Shape, ...],
    *,
    tokens: int | None = None,
    shared: int | None = None,
    repeats: int | None = None,
) -> tuple[Layer, ...]:
    """A layer for each shape; None leaves what the layer of this name has."""
    by_shape = {layer.shape: layer for layer in LAYERS}

    def changed(layer: Layer) -> Layer:
        return layer.with_tokens(layer.shape.tokens if tokens is None else tokens)._replace(
            shared=layer.shared if shared is None else shared,
            repeats=layer.repeats if repeats is None else repeats,
        )

    return tuple(changed(by_shape.get(shape, Layer(shape))) for shape in shapes)
