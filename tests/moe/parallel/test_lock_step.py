"""Models in step in two processes: what all ranks get is what the plain model gives in one."""

from two_processes import run_in_two_processes

IMPORTS = """
import copy, signal
from contextlib import contextmanager, nullcontext, suppress
import torch._dynamo  # set_stance, of traces, imports it
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from ironmoe.moe import Capacity, MoE, SoftMoE, VMoE, aux_loss_in_eval, trace_routing
from ironmoe.moe import collect_aux_loss, freeze_weights, intervene
from ironmoe.moe.distributed import counted_traffic, in_step, parallelize
from ironmoe.moe.distributed import ExchangeError, RanksDisagreeError
from ironmoe.moe.parallel.layers import expert_parallels
from ironmoe.moe.parallel.lock_step import check_in_step, group_in_step
"""
PROGRAM = '''
EP = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
BOTH = init_device_mesh("cpu", (2, 1), mesh_dim_names=("fsdp", "ep"))

def pair(mesh=EP, **options):
    """(the plain model, the same one shared out)."""
    torch.manual_seed(0)
    options = {"moe_layers": (1,), "num_experts": 4, "channels": 1, "classifier": "gap"} | options
    plain = VMoE(8, 4, 16, 2, 2, 24, 3, **options).double().eval()
    nn.init.normal_(plain.head.weight)  # it begins with 0, and so would all logits
    return plain, parallelize(copy.deepcopy(plain), mesh)

def images(count, seed=1):
    return torch.rand(count, 1, 8, 8, dtype=torch.float64,
                      generator=torch.Generator().manual_seed(seed)).requires_grad_()

def same_everywhere(values):
    """All ranks have these bits."""
    each = [torch.empty_like(values) for _ in range(2)]
    dist.all_gather(each, values.detach().contiguous())
    assert each[0].equal(each[1])

def answers(model, x, second=True):
    """Logits, the gradient of a loss, and that of its square."""
    logits = model(x)
    loss = logits.logsumexp(1).sum() - logits[:, 0].square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=second)
    if not second:
        return logits, grad
    (again,) = torch.autograd.grad(grad.square().sum(), x)
    return logits, grad, again

def compare(plain, shared, count, around=lambda model: nullcontext(), second=True):
    with freeze_weights(plain), freeze_weights(shared):
        with around(plain):
            wanted = answers(plain, images(count), second)
        with in_step(shared), around(shared):
            found = answers(shared, images(count), second)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        same_everywhere(got)

def dropless():
    plain, shared = pair()
    for count in (1, 2, 3, 5):
        compare(plain, shared, count)
    assert not expert_parallels(shared)[0].tokens_are_replicated
    with torch.no_grad(), in_step(shared):
        assert shared(images(0)).shape == (0, 3)

def work_is_shared():
    """Each rank's blocks see half of the images, also the copies that nobody reads."""
    plain, shared = pair()
    seen = []
    shared.blocks[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    with torch.no_grad(), in_step(shared):
        for count in (4, 5, 1):
            shared(images(count))
    assert seen == [2, 3, 1], seen

def soft():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), SoftMoE(8, 16, 4, 2),
                          nn.Flatten(), nn.Linear(8, 3)).double()
    compare(plain.eval(), parallelize(copy.deepcopy(plain), EP).eval(), 3)

def groups_stay_whole():
    for capacity, counts in ((Capacity(0.6, images_per_group=2), (2, 4, 6, 3)),
                             (Capacity(0.6), (1, 4, 5)),
                             (Capacity(0.6, tokens_per_group=6), (4,))):
        plain, shared = pair(capacity=capacity)
        for count in counts:
            compare(plain, shared, count, second=False)

def fully_sharded():
    plain, shared = pair(BOTH)
    for count in (1, 3):
        compare(plain, shared, count, second=False)
    with trace_routing(plain) as wanted:
        plain(images(3))
    with in_step(shared), trace_routing(shared) as found:
        shared(images(3))
    (want,), (got,) = wanted.layers.values(), found.layers.values()
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-12, atol=1e-12)

def traces_and_interventions():
    plain, shared = pair()
    traces = []

    @contextmanager
    def traced(model):
        with trace_routing(model) as trace:
            traces.append(trace)
            yield

    def others(decision):
        experts = (decision.routing.experts + 1) % decision.num_experts
        return decision.routing._replace(experts=experts)

    compare(plain, shared, 3, traced)
    wanted, found = (next(iter(trace.layers.values())) for trace in traces)
    assert found.experts.equal(wanted.experts) and found.experts.shape == (12, 2)
    torch.testing.assert_close(found.gates, wanted.gates, rtol=1e-12, atol=1e-12)
    compare(plain, shared, 3, lambda model: intervene(model, others))
    compare(plain, shared, 3)  # parts again

    # a trace that is older than the block
    with trace_routing(shared) as trace, in_step(shared), torch.no_grad():
        shared(images(3))
    assert next(iter(trace.layers.values())).experts.equal(wanted.experts)

class Repeated(nn.Module):
    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)

def after_the_block():
    """A backward pass that comes later, and copies: plain passes then have tokens of their own."""
    plain, shared = pair()
    with in_step(shared), trace_routing(shared):
        whole = answers(shared, images(3), second=False)[0]
        seen = []
        handle = shared.blocks[0].register_full_backward_hook(
            lambda _, __, grads: seen.append(len(grads[0])))
        answers(shared, images(4), second=False)
        handle.remove()
        logits = shared(images(3))
        copied = copy.deepcopy(shared)
    assert seen == [4] and whole.shape == (3, 3)
    logits.sum().backward()
    for model in (shared, copied):
        own = images(2, seed=rank)
        torch.testing.assert_close(model(own), plain(own), rtol=1e-12, atol=1e-12)

    class Boom(Exception):
        pass

    def boom(_):
        raise Boom

    # a backward pass that fails, in the block and after it
    x = images(3)
    with in_step(shared), trace_routing(shared):
        for _ in range(2):
            logits = shared(x)
            x.register_hook(boom)
            with suppress(Boom):
                logits.sum().backward(retain_graph=True)
        x._backward_hooks.clear()
    logits.sum().backward()
    torch.testing.assert_close(shared(own), plain(own), rtol=1e-12, atol=1e-12)

    # what is repeated after the block is a pass of the block
    layer = MoE(8, 16, 4, 2).double().eval()
    alike = copy.deepcopy(layer).parallelize(EP, max_tokens_per_rank=1)
    for reentrant in (True, False):
        grads = []
        for each in (layer, alike):
            rows = torch.rand(6, 8, generator=torch.Generator().manual_seed(3)).double()
            rows.requires_grad_()
            wrapped = Repeated(each, reentrant).eval()
            with in_step(wrapped):
                y = wrapped(rows)
            y.square().sum().backward()
            grads.append(rows.grad)
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)

    _, bounded = pair()
    (experts,) = expert_parallels(bounded)
    experts.max_tokens_per_rank = 1
    with in_step(bounded):
        torch.testing.assert_close(bounded(images(3)), plain(images(3)), rtol=1e-12, atol=1e-12)
        (copied,) = expert_parallels(copy.deepcopy(bounded))
    for each in (experts, copied):
        assert each.max_tokens_per_rank == 1 and not each.every_row_travels

def auxiliary_losses():
    plain, shared = pair()
    found = []
    for model in (plain, shared):
        with in_step(model), aux_loss_in_eval(model):
            x = images(3)
            model(x)
            found.append(torch.autograd.grad(collect_aux_loss(model), x)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    same_everywhere(found[1])

class Draws(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)

def random_models():
    """Whole or in parts: every rank has the same numbers, each part draws its own, and no rank's
    random state depends on what the others drew."""
    shared = parallelize(nn.Sequential(MoE(8, 8, 2), Draws()).double().eval(), EP)
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = x[:1].expand(4, 8).clone()
    torch.manual_seed(rank)
    with torch.no_grad(), in_step(shared):
        parts, others = shared(x), shared(x)
        with trace_routing(shared):
            whole = shared(x)
    for values in (parts, others, whole):
        same_everywhere(values)
    zeros = parts == 0
    assert not zeros[:2].equal(zeros[2:]) and not zeros.equal(others == 0)
    torch.manual_seed(rank)
    drawn = torch.rand(5)
    torch.manual_seed(rank)
    with torch.no_grad(), in_step(shared):
        shared(x)
    after = torch.rand(5)
    torch.manual_seed(rank)
    torch.randint(2**62, ())
    assert after.equal(torch.rand(5)) and not after.equal(drawn)

class Named(nn.Module):
    """Called as other libraries call theirs: inputs by keyword, answers in a dict."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *, tokens, scale, table):
        y = self.layer(tokens) * scale[:, None]
        return {"rows": y, "states": (y, y[:, :1] > 0), "table": table.sum(), "none": None}

def nested_inputs_and_outputs():
    torch.manual_seed(0)
    plain = Named(MoE(8, 8, 2).double().eval())
    shared = parallelize(copy.deepcopy(plain), EP)
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inputs = {"tokens": x, "scale": torch.arange(3.0).double(), "table": torch.ones(7)}
    wanted = plain(**inputs)
    with in_step(shared):
        parts = shared(**inputs)
        with trace_routing(shared):
            whole = shared(**inputs)
    for found in (parts, whole):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

def places_for_all():
    """A bound of the buffers drops no row here, and is back afterwards."""
    torch.manual_seed(0)
    plain = MoE(8, 8, 4).double().eval()
    shared = parallelize(copy.deepcopy(plain), EP, max_tokens_per_rank=1)
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with in_step(shared):
        torch.testing.assert_close(shared(x), plain(x), rtol=1e-12, atol=1e-12)
    assert expert_parallels(shared)[0].max_tokens_per_rank == 1

def blocks_inside_blocks():
    plain, shared = pair()
    outer = nn.Sequential(shared, nn.Softmax(1))
    with in_step(shared), in_step(outer), in_step(outer):
        found = outer(images(3))
    torch.testing.assert_close(found, plain(images(3)).softmax(1), rtol=1e-12, atol=1e-12)
    assert not outer._forward_hooks and not shared._forward_hooks

def refused():
    plain, shared = pair()
    for what, x, words in (
        ("numbers", images(2 + rank), f"{2 + rank} images on rank {rank}"),
        ("images", images(2, seed=rank), "the checksum"),
        ("gradients", images(2).requires_grad_(bool(rank)), f"requires_grad={bool(rank)}"),
    ):
        try:
            with in_step(shared):
                shared(x)
        except RanksDisagreeError as error:
            assert words in str(error), error
        else:
            raise AssertionError(what)
    order = torch.arange(2).roll(rank)
    try:
        with in_step(shared):
            shared(images(2)[order])
    except RanksDisagreeError as error:
        assert "order" in str(error)
    else:
        raise AssertionError("order")
    _, other = pair()
    for models, words in (((shared, other), "of those in step"),
                          ((other if rank else shared,), "of those that were parallelized")):
        try:
            with in_step(*models):
                models[rank * (len(models) - 1)](images(2))
        except RanksDisagreeError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)
    with in_step(shared):  # nothing is left of what failed
        torch.testing.assert_close(shared(images(3)), plain(images(3)), rtol=1e-12, atol=1e-12)

    check_in_step(plain)
    try:
        check_in_step(shared)
    except ValueError as error:
        assert "with in_step(model):" in str(error)
    else:
        raise AssertionError("outside")
    try:
        with in_step(shared):
            torch.func.jvp(shared, (images(2),), (images(2),))
    except NotImplementedError as error:
        assert "torch.func" in str(error)
    else:
        raise AssertionError("func")

def repeated_in_the_backward_pass():
    """Activation checkpointing repeats a block as it ran, although another pass ran otherwise."""
    for reentrant in (False, True):
        plain, shared = pair()
        block = shared.blocks[1]
        run = block.forward
        block.forward = lambda *args, run=run: checkpoint(run, *args, use_reentrant=reentrant)
        for count, first in ((3, "sliced"), (1, "sliced"), (3, "whole")):
            x, twin = images(count), images(count)
            with in_step(shared), freeze_weights(shared), freeze_weights(plain):
                def traced():
                    with trace_routing(shared):
                        return shared(images(2).detach())
                if first == "whole":
                    with trace_routing(shared):
                        logits = shared(x)
                    shared(images(2).detach())
                else:
                    logits = shared(x)
                    traced()
                logits.square().sum().backward()
                plain(twin).square().sum().backward()
            torch.testing.assert_close(x.grad, twin.grad, rtol=1e-12, atol=1e-12)

def counted():
    """Every rank gives its outputs and input gradients to the other one."""
    _, shared = pair()
    with counted_traffic() as traffic, in_step(shared), freeze_weights(shared):
        answers(shared, images(4), second=False)
    rows = 2 * 8 * (3 + 64)  # two images of a rank: logits and gradients in float64
    assert traffic.in_step == rows + 7 * 8, traffic  # and what is compared first

def alone():
    plain, _ = pair()
    assert group_in_step(plain, len) is None
    with in_step(plain):
        assert not plain._forward_hooks
    try:
        with in_step(len):
            pass
    except TypeError:
        return
    raise AssertionError("no module")

for case in (dropless, work_is_shared, soft, groups_stay_whole, fully_sharded,
             traces_and_interventions, after_the_block, auxiliary_losses, random_models,
             nested_inputs_and_outputs, places_for_all, blocks_inside_blocks,
             repeated_in_the_backward_pass, refused, counted, alone):
    case()

def end():
    """One rank is killed before the other one gathers its weights by FSDP2."""
    _, shared = pair(BOTH)
    if rank == 1:
        shared.blocks[0].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    try:
        with in_step(shared):
            shared(images(2))
    except ExchangeError as error:
        assert "rank 1 (process " in str(error) and "ended" in str(error), error
        os.waitpid(children[0], 0)
        os._exit(0)
    raise AssertionError("ended")

end()
'''


def test_all_ranks_get_what_one_process_gets(tmp_path):
    run_in_two_processes(PROGRAM, tmp_path, before=IMPORTS)
