"""torch.export of patched Hugging Face models: batch and length may change."""

import pytest
import torch
from torch import nn
from torch.export import Dim, export

transformers = pytest.importorskip("transformers", minversion="5.17")

from ironmoe.moe import huggingface  # noqa: E402

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN = {"moe_intermediate_size": 32, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 16}
SHAPES = ({0: Dim("B", min=1, max=64), 1: Dim("N", min=2, max=512)},)


class Logits(nn.Module):
    """A model with tensors in and a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def patched(family):
    if family == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=3)
        model = transformers.MixtralForCausalLM(config)
    else:
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **QWEN))
    return Logits(huggingface.patch(model).eval())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_patched_model_exports_with_any_batch_and_length(family, strict):
    model = patched(family)
    example = torch.randint(100, (2, 7))
    program = export(model, (example,), dynamic_shapes=SHAPES, strict=strict)
    assert "ironmoe.grouped_matmul.default" in str(program.graph_module.print_readable(False))
    run = program.module()
    for shape in ((1, 2), (3, 5), (9, 100)):
        ids = torch.randint(100, shape)
        torch.testing.assert_close(run(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_padding_stays_padding_in_an_exported_model():
    model = patched("mixtral")
    mask = torch.ones(2, 7, dtype=torch.int64)
    shapes = (SHAPES[0], SHAPES[0])
    run = export(model, (torch.randint(100, (2, 7)), mask), dynamic_shapes=shapes).module()
    ids, mask = torch.randint(100, (3, 20)), torch.ones(3, 20, dtype=torch.int64)
    mask[1, 15:] = 0
    torch.testing.assert_close(run(ids, mask), model(ids, mask), rtol=1e-4, atol=1e-4)


def test_a_patched_model_becomes_an_onnx_model():
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    model = patched("mixtral")
    example = (torch.randint(100, (2, 7)),)
    program = torch.onnx.export(model, example, dynamo=True, dynamic_shapes=SHAPES, verbose=False)
    for shape in ((1, 2), (9, 100)):
        ids = torch.randint(100, shape)
        torch.testing.assert_close(program(ids)[0], model(ids), rtol=1e-4, atol=1e-4)
