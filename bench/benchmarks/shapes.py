"""The layers that are measured: sizes of published models, four ways to load their experts, and the
tensors of one layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.kernels import Routing
from ironmoe.kernels.activations import GATED_ACTIVATIONS

SIZES = "T,d,n,E,K"  # what ``Shape.numbers`` are, for people


class Shape(NamedTuple):
    """One layer: T tokens of width D, E experts of hidden width F, of which each token takes K."""

    name: str
    tokens: int
    dim: int
    hidden: int
    num_experts: int
    top_k: int
    activation: str = "swiglu"
    bias: bool = False

    @property
    def rows(self) -> int:
        """R = T · K."""
        return self.tokens * self.top_k

    @property
    def wide(self) -> int:
        """Columns of H: 2F for a gated activation, else F."""
        return self.hidden * (2 if self.activation in GATED_ACTIVATIONS else 1)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(T, D, F, E, K)."""
        return self.tokens, self.dim, self.hidden, self.num_experts, self.top_k

    @property
    def numbers(self) -> str:
        """The sizes as ``--shapes`` takes them, which are also the name of a layer of one's own."""
        return ",".join(map(str, self.sizes))

    @property
    def title(self) -> str:
        """The name and the sizes, each once."""
        return self.name if self.name == self.numbers else f"{self.name} {self.numbers}"


def _vision(name: str, images: int, patches: int, dim: int, num_experts: int) -> Shape:
    """A V-MoE layer: hidden width 4D, two choices a token, a class token in each image, GELU and
    biases."""
    return Shape(
        name, images * (patches + 1), dim, 4 * dim, num_experts, 2, activation="gelu", bias=True
    )


MAIN = Shape("qwen3-30b", 32768, 2048, 768, 128, 8)  # the goals are set for this one
FIRST_SHAPES = (
    MAIN,
    Shape("olmoe", 32768, 2048, 1024, 64, 8),
    _vision("vmoe-b16-e8", 128, 196, 768, 8),
    _vision("vmoe-b16-e32", 128, 196, 768, 32),
    _vision("vmoe-s32-e8", 1024, 49, 512, 8),
    _vision("vmoe-s32-e32", 1024, 49, 512, 32),
    Shape("mixtral", 32768, 4096, 14336, 8, 2),
    Shape("qwen3-next", 32768, 2048, 512, 512, 10),
    *(MAIN._replace(name=f"decode-{tokens}", tokens=tokens) for tokens in (1, 8, 32, 128)),
)
SHAPES = (  # most important first: a short run leaves out the last ones
    *FIRST_SHAPES,
    Shape("qwen3-30b-8k", 8192, 2048, 768, 128, 8),
    Shape(
        "gpt-oss-20b", 32768, 2880, 2880, 32, 4, activation="clamped_swiglu_interleaved", bias=True
    ),
    _vision("vmoe-l16-e32", 64, 196, 1024, 32),
    _vision("vmoe-h14-e32", 32, 256, 1280, 32),
    Shape("fine-grained", 32768, 4096, 1024, 128, 8),
    Shape("fine-grained-7b", 24576, 1536, 256, 128, 8),
    Shape("deepseek-v2-lite", 32768, 2048, 1408, 64, 6),
    Shape("kimi-linear", 32768, 2304, 1024, 256, 8),
    Shape("llama4-scout", 8192, 5120, 8192, 16, 1),
    Shape("qwen3-235b", 32768, 4096, 1536, 128, 8),
)
REHEARSAL = (  # for a rehearsal of the program without a GPU: the figures mean nothing
    Shape("toy-gated", 96, 32, 16, 8, 2),
    Shape("toy-biases", 60, 16, 32, 4, 2, activation="gelu", bias=True),
)


def uniform(shape: Shape, device: torch.device) -> Tensor:
    """Every expert is as likely as any other."""
    return _draw(torch.zeros(shape.num_experts, device=device), shape)


def zipf(shape: Shape, device: torch.device) -> Tensor:
    """Expert i is drawn with a chance ∝ 1 / (i + 1). Later choices of a token are drawn from the
    experts that it has left."""
    return _draw(-torch.arange(1, shape.num_experts + 1, device=device).log(), shape)


def half_empty(shape: Shape, device: torch.device) -> Tensor:
    """The upper half of the experts gets no token. A layer whose lower half has fewer than K
    experts uses K."""
    used = max(shape.num_experts // 2, shape.top_k)
    log_chances = torch.full((shape.num_experts,), float("-inf"), device=device)
    log_chances[:used] = 0
    return _draw(log_chances, shape)


def all_to_one(shape: Shape, device: torch.device) -> Tensor:
    """All K choices of every token are expert 0: the most uneven load there can be."""
    return torch.zeros(shape.tokens, shape.top_k, device=device, dtype=torch.int32)


ROUTINGS: dict[str, Callable[[Shape, torch.device], Tensor]] = {
    "uniform": uniform,
    "zipf": zipf,
    "half_empty": half_empty,
    "all_to_one": all_to_one,
}


def _draw(log_chances: Tensor, shape: Shape) -> Tensor:
    """(T, K) int32: K different experts for each token. The largest of log chance + Gumbel noise
    are a draw without replacement."""
    noise = (
        -torch.empty(shape.tokens, shape.num_experts, device=log_chances.device)
        .exponential_()
        .log()
    )
    return (log_chances + noise).topk(shape.top_k, dim=1).indices.to(torch.int32)


class Problem(NamedTuple):
    """The tensors of one layer.

    x (T, D), gates (T, K), the weights and biases of all experts: leaves that require grad; experts
    (T, K) int32: the choices; dy (T, D): the gradient that comes from above.
    """

    shape: Shape
    x: Tensor
    gates: Tensor
    experts: Tensor
    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    dy: Tensor

    @property
    def routing(self) -> Routing:
        return Routing(self.gates, self.experts)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """All tensors that can have a gradient, by name."""
        return {"x": self.x, "gates": self.gates, **self.parameters}

    @property
    def parameters(self) -> dict[str, Tensor]:
        named = {"w_in": self.w_in, "w_out": self.w_out, "b_in": self.b_in, "b_out": self.b_out}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def frozen(self) -> "Problem":
        """The same memory with weights that do not require grad, as under attack."""
        b_in, b_out = (None if bias is None else bias.detach() for bias in (self.b_in, self.b_out))
        return self._replace(
            w_in=self.w_in.detach(), w_out=self.w_out.detach(), b_in=b_in, b_out=b_out
        )

    def double(self) -> "Problem":
        """The same numbers in float64."""
        wide: dict[str, Any] = {
            name: value.detach().double().requires_grad_(value.requires_grad)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return self._replace(**wide)


def make_problem(shape: Shape, routing: str, dtype: torch.dtype, device: torch.device) -> Problem:
    """A layer with random tensors.

    Numbers are normal and scaled so that H and y have about unit variance; the gates (T, K) of a
    token are float32 and add up to 1.

    routing: a name of ROUTINGS.
    """
    T, D, F, E, K = shape.sizes
    experts = ROUTINGS[routing](shape, device)

    def leaf(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype).mul_(scale).requires_grad_()

    return Problem(
        shape=shape,
        x=leaf(T, D),
        gates=torch.randn(T, K, device=device).softmax(1).requires_grad_(),
        experts=experts,
        w_in=leaf(E, shape.wide, D, scale=D**-0.5),
        w_out=leaf(E, D, F, scale=F**-0.5),
        b_in=leaf(E, shape.wide, scale=0.1) if shape.bias else None,
        b_out=leaf(E, D, scale=0.1) if shape.bias else None,
        dy=leaf(T, D).detach(),
    )


def dense_problem(problem: Problem) -> Problem:
    """One expert for all R rows: the same FLOPs with nothing to route, which is the limit."""
    shape = problem.shape
    dense = shape._replace(name=f"{shape.name} dense", tokens=shape.rows, num_experts=1, top_k=1)
    return make_problem(dense, "all_to_one", problem.x.dtype, problem.x.device)
