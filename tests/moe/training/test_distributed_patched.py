"""A patched Hugging Face model in two processes: DistributedDataParallel and FSDP2, against the
same model without ``patch``."""

import pytest
from two_processes import run_in_two_processes

pytest.importorskip("transformers", minversion="5.17")

IMPORTS = """
import torch._dynamo  # DistributedDataParallel imports it
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig, MixtralForCausalLM
from ironmoe.moe import huggingface
"""
PROGRAM = """
ids = (torch.arange(24).view(2, 12) + rank) % 50
mask = torch.ones_like(ids)
mask[:, 9:] = 0
labels = ids.masked_fill(mask == 0, -100)

def make():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
        output_router_logits=True,
    )
    return MixtralForCausalLM(config).train()

def gradients(model, run):
    run(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    grads = (p.grad for p in model.parameters())
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]

def sharded(model, experts_alone=False):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer.mlp.experts if experts_alone else layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

plain = make()
expected = gradients(plain, DistributedDataParallel(plain))
for kind in ("data parallel", "sharded", "experts alone", "patched after sharding"):
    model = make()
    run = model
    if kind != "patched after sharding":
        huggingface.patch(model)
    if kind == "data parallel":
        run = DistributedDataParallel(model)
    else:
        sharded(model, experts_alone=kind == "experts alone")
    if kind == "patched after sharding":
        huggingface.patch(model)
    for got, want in zip(gradients(model, run), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=kind)
    dist.barrier()
"""


def test_two_processes_train_a_patched_model_as_one_that_is_not(tmp_path):
    run_in_two_processes(PROGRAM, tmp_path, before=IMPORTS)
