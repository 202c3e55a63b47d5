"""Upcycled models, and a ``VMoE`` with each kind of layer, on two ranks: against one process that
has the images of both."""

from two_processes import run_in_two_processes

IMPORTS = """
torch.set_flush_denormal(True)
import copy, functools, pytest
import torch._dynamo  # an optimizer imports it
import torch.distributed.tensor
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
import staged_twins, twins
from ironmoe.moe import (
    Capacity, ExpertChoiceRouter, MoE, SoftMoE, VMoE, recipe_of, save_upcycled, upcycle,
    upcycle_by_recipe,
)
from ironmoe.moe.distributed import average_gradients, parallelize
"""
PROGRAM = '''
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
full = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def step(model, *batches):
    """What a step of SGD makes of a loss that is a sum over the images of the batches."""
    found = {}
    for x in batches:
        x.grad = None
        y = model(x.requires_grad_())
        weights = torch.arange(y[0].numel(), dtype=torch.float64).cos().view_as(y[0])
        (y * weights).sum().div(10).backward()
        found = {"y": y.detach(), "dx": x.grad}
    if len(batches) == 1:
        average_gradients(model, mesh, gradients="sum")
    found |= {f"d {n}": full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return found | {n: full(p).detach() for n, p in model.named_parameters()}

def check(name, model, *shape):
    """The same numbers on two ranks, which have 2 and 3 images, as in one process."""
    images = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1)).double()
    alone = model.double().eval()
    many = parallelize(copy.deepcopy(alone), mesh, gradients="sum")
    own, other = images[:2].clone(), images[2:].clone()
    if rank == 1:
        own, other = other, own
    got, want = step(many, own), step(alone, other, own)
    assert got.keys() == want.keys(), name
    assert any(value.abs().max() > 1e-3 for value in got.values())
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-12, msg=f"{name}: {key}")
    return many

torch.manual_seed(0)
experts = functools.partial(upcycle, num_experts=4, top_k=2, noise=0.5)

# torch's own encoder
def encoder():
    layer = nn.TransformerEncoderLayer(twins.DIM, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()

many = check("encoder", experts(encoder()), 3, twins.DIM)

# what is saved of it: one rank alone asks, and does not wait for the other
if rank == 0:
    with pytest.raises(ValueError, match="save_weights, and keep recipe_of"):
        save_upcycled(many, "model.safetensors")
    assert not os.path.exists("model.safetensors")
again = upcycle_by_recipe(encoder(), recipe_of(many)).double()
again.load_state_dict({n: full(value) for n, value in many.state_dict().items()})
x = torch.randn(2, 3, twins.DIM).double()
torch.testing.assert_close(many(x), again(x), rtol=1e-12, atol=1e-12)

# images whose pixels are tokens, with the channels first
check("convolutions", experts(staged_twins.TimmConvNeXt()), 3, staged_twins.SIDE, staged_twins.SIDE)

# one layer that two blocks call, and two layers with one router
model = twins.Encoder(3)
model.blocks[2].mlp = model.blocks[0].mlp
many = check("one layer twice", experts(model), 3, twins.DIM)
assert many.blocks[2].mlp is many.blocks[0].mlp
model = experts(twins.Encoder(2))
model.blocks[1].mlp.router = model.blocks[0].mlp.router
check("one router twice", model, 3, twins.DIM)

# two layers that share experts would have them apart
for share_module in (True, False):
    model = experts(twins.Encoder(2))
    first, second = (block.mlp for block in model.blocks)
    if share_module:
        second.fc1 = first.fc1
    else:
        second.fc1.weight = first.fc1.weight
    with pytest.raises(ValueError, match="must not share weights of experts between layers"):
        parallelize(model, mesh)
    assert first.expert_parallel is None

# a VMoE with each kind of layer
D = 16
vmoe = functools.partial(VMoE, 16, 4, D, 2, 2, 32, 5, moe_layers="all", num_experts=4, channels=1)
choice = lambda: MoE(D, 32, 4, router=ExpertChoiceRouter(D, 4, images_per_group=1))
for name, options in {
    "plain": {},
    "ensemble": {"ensemble_size": 2, "top_k": 1},
    "capacity": {"capacity": Capacity(0.7, images_per_group=1)},
    "expert choice": {"make_moe": choice},
    "soft": {"make_moe": lambda: SoftMoE(D, 32, 4, 2)},
}.items():
    model = vmoe(**options)
    nn.init.normal_(model.head.weight)  # it starts at 0
    check(name, model, 1, 16, 16)
'''


def test_upcycled_models_and_each_kind_of_layer_on_two_ranks_equal_one_process(tmp_path):
    run_in_two_processes(PROGRAM, tmp_path, before=IMPORTS)
