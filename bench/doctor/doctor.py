"""``ironmoe doctor``: print what is here and which code each operation runs, and test whether it
computes what it should."""

import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table

from ironmoe.attacks import PGD
from ironmoe.bench.common.machine.compiler import INSTALL_TRITON
from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.radii import USUAL_EPS
from ironmoe.bench.reports.tables import print_table
from ironmoe.kernels import ACTIVATIONS, Routing, expert_mlp, topk_route
from ironmoe.kernels.tiles import MULTIPLIES_BFLOAT16, ONEDNN_MIN_PRODUCT, ONEDNN_MIN_WEIGHT
from ironmoe.kernels.tuning import chip_of
from ironmoe.moe import VMoE


def run_doctor(console: Console) -> bool:
    """Print everything. True if every test passed."""
    print_table(_versions_table(), console)
    print_table(_paths_table(), console)

    tests = SELF_TESTS | (GPU_SELF_TESTS if torch.cuda.is_available() else {})
    passed = True
    for name, test in tests.items():
        start = time.perf_counter()
        try:
            test()
            outcome = "[green]ok[/]"
        except Exception as error:  # a self-test reports whatever goes wrong
            outcome, passed = f"[bold red]FAILED[/] {type(error).__name__}: {error}", False
        console.print(f"{name:<64} {outcome}  {time.perf_counter() - start:.1f} s", highlight=False)

    return passed


def _versions_table() -> Table:
    table = Table("", "found", title="Versions and devices", title_justify="left")
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("CPU", describe_device(torch.device("cpu")))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row(
        "GPU", ", ".join(gpus) or f"none that torch can use (this torch is built {_built_for()})"
    )
    return table


def _built_for() -> str:
    return (
        f"for CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"for ROCm {torch.version.hip}"
        if torch.version.hip
        else "for CPU"
    )


def _paths_table() -> Table:
    table = Table("operation", "path here", "why", title="Code paths", title_justify="left")
    table.add_row("topk_route", "torch", "a stable sort: ties go to the lower index")
    table.add_row("plan_dispatch", "torch", "a stable sort by expert")
    table.add_row(
        "expert_mlp, grouped_matmul",
        "torch, tile by tile of each expert's rows",
        "stays in cache; faster than grouped_mm on CPU",
    )
    _add_products(table)
    table.add_row(
        "combine", "torch.embedding_bag, or einsum under autograd", "one pass over the rows"
    )
    table.add_row("linf_step, l2_step", "torch", "")

    table.add_row("all, on CUDA tensors", *_gpu_path())
    table.add_row(
        "  their float64", "the same torch code as on CPU", "exact reference; waits for the device"
    )
    table.add_row(
        "second derivatives", "torch, tile by tile, on every device", "differentiable to any order"
    )
    return table


def _add_products(table: Table) -> None:
    """Add a row for the matrix products of each dtype on the CPU."""
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    large = ONEDNN_MIN_PRODUCT[torch.float32] // 1_000_000
    why_float32 = (
        f"oneDNN from {large} M multiply-adds where the product feeds another one: faster, but "
        "rounds more"
        if onednn
        else "BLAS: this torch has no oneDNN"
    )
    table.add_row("  their float32 products", "oneDNN or BLAS" if onednn else "BLAS", why_float32)

    large = ONEDNN_MIN_PRODUCT[torch.bfloat16] // 1_000_000
    weight = ONEDNN_MIN_WEIGHT // 1_000_000
    table.add_row(
        "  their bfloat16 products",
        f"torch.mm from {large} M multiply-adds or {weight} M weights, else float32"
        if MULTIPLIES_BFLOAT16
        else "float32 arithmetic",
        "small ones are faster in float32"
        if MULTIPLIES_BFLOAT16
        else "this processor has no products of bfloat16",
    )
    table.add_row(
        "  their float16 products",
        "float32 arithmetic",
        "torch.mm in float16 is up to 100 times slower on CPU",
    )
    table.add_row("  their float64 products", "torch.mm", "exact reference")


def _gpu_path() -> tuple[str, str]:
    """(the code that runs for tensors on a GPU, why)."""
    if find_spec("triton") is None:
        return (
            "the same torch code as on CPU",
            f"Triton is not installed: {INSTALL_TRITON}",
        )

    if not torch.cuda.is_available():
        return (
            "Triton kernels",
            "no GPU here; `ironmoe doctor --compile` compiles them all the same",
        )

    chip = chip_of(torch.empty(0, device="cuda"))
    loads = "weights through TMA" if chip.tma else "weights through pointers"
    return (
        "Triton kernels",
        f"configured as for {chip.name}: {loads}, {chip.shared_memory:,} bytes of shared memory",
    )


def _test_experts() -> None:
    """Each activation against all experts computed densely."""
    generator = torch.Generator().manual_seed(0)
    for name, activation in ACTIVATIONS.items():
        x, w_in, w_out, logits = _random_layer(generator, activation.gated)
        routing = topk_route(logits, 2)
        dense = torch.einsum(
            "edf,tef->ted", w_out, activation.value(torch.einsum("efd,td->tef", w_in, x))
        )
        weights = torch.zeros_like(logits).scatter(1, routing.experts.long(), routing.gates)
        expected = torch.einsum("te,ted->td", weights, dense)
        torch.testing.assert_close(expert_mlp(x, w_in, w_out, routing, activation=name), expected)


def _test_gradients() -> None:
    """First and second derivatives by finite differences in float64."""
    generator = torch.Generator().manual_seed(1)
    inputs = tuple(t.requires_grad_() for t in _random_layer(generator, gated=True))

    def layer(
        x: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        return expert_mlp(x, w_in, w_out, topk_route(logits, 2), activation="swiglu")

    torch.autograd.gradcheck(layer, inputs)
    torch.autograd.gradgradcheck(layer, inputs)


def _test_demand() -> None:
    """Input gradients are the same bits with frozen and with trainable weights."""
    generator = torch.Generator().manual_seed(2)
    x, w_in, w_out, logits = (t.float() for t in _random_layer(generator, gated=False))
    routing = Routing(*(t.detach() for t in topk_route(logits, 2)))
    grads = []

    for trainable in (False, True):
        leaf = x.clone().requires_grad_()
        y = expert_mlp(
            leaf,
            w_in.clone().requires_grad_(trainable),
            w_out.clone().requires_grad_(trainable),
            routing,
        )
        grads.append(torch.autograd.grad(y.sum(), [leaf])[0])

    assert torch.equal(*grads), "gradients differ"


def _test_kernels() -> None:
    """The Triton kernels against torch in float64: values and every gradient."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((300, 64), (5, 192, 64), (5, 64, 96), (300, 5))
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        for shape in shapes
    ]

    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
        found = []
        for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
            x, w_in, w_out, logits = (
                leaf.to(dtype).to(device, kind).requires_grad_() for leaf in leaves
            )
            y = expert_mlp(x, w_in, w_out, topk_route(logits, 2), activation="swiglu")
            found.append(
                [y, *torch.autograd.grad(y.double().square().sum(), [x, w_in, w_out, logits])]
            )
        for exact, got in zip(*found, strict=True):
            error = (got.double().cpu() - exact).norm() / exact.norm()
            assert error < tolerance, f"{dtype}: error {error:.1e}, allowed {tolerance:g}"


def _test_attack() -> None:
    """PGD reaches the optimum of a linear model that is known in closed form."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, generator=generator)
    images = 0.25 + 0.5 * torch.rand(32, 64, generator=generator)

    def model(x: torch.Tensor) -> torch.Tensor:
        score = (x - 0.5) @ weight.to(x.dtype)
        return torch.stack([-score, score], dim=1)

    labels = model(images).argmax(1)
    for norm, dual in (("Linf", weight.abs().sum()), ("L2", weight.norm())):
        result = PGD(model, 0.1, steps=100, norm=norm, loss="margin", early_stop=False).run(
            images, labels
        )
        moved = ((result.adversarial - images) @ weight).abs()
        torch.testing.assert_close(moved, (0.1 * dual).expand(32), rtol=1e-4, atol=0)


def _test_model() -> None:
    """A V-MoE trains one step and is attacked."""
    torch.manual_seed(0)
    model = VMoE(
        image_size=16,
        patch_size=4,
        dim=32,
        depth=2,
        heads=4,
        mlp_dim=64,
        num_classes=5,
        moe_layers=(1,),
        channels=1,
    )
    images, labels = torch.rand(8, 1, 16, 16), torch.arange(8) % 5

    torch.nn.functional.cross_entropy(model(images), labels).backward()
    assert all(p.grad is not None for p in model.parameters()), "a parameter got no gradient"

    PGD(model, USUAL_EPS, steps=3).run(images, labels)
    assert model.training, "the attack left the model in eval mode"


def _random_layer(generator: torch.Generator, gated: bool) -> tuple[torch.Tensor, ...]:
    """x (6, 3), w_in (4, 4 or 8, 3), w_out (4, 3, 4), logits (6, 4), in float64."""
    shapes = ((6, 3), (4, 8 if gated else 4, 3), (4, 3, 4), (6, 4))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


SELF_TESTS: dict[str, Callable[[], None]] = {
    "experts equal the dense sum, each activation": _test_experts,
    "first and second derivatives, float64": _test_gradients,
    "frozen and trainable weights: the same input gradient, bit by bit": _test_demand,
    "PGD reaches the known optimum of a linear model, Linf and L2": _test_attack,
    "a V-MoE trains and is attacked": _test_model,
}
GPU_SELF_TESTS: dict[str, Callable[[], None]] = {
    "the GPU's kernels equal float64, values and gradients": _test_kernels
}
