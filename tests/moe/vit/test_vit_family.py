"""The papers' models by name, and what ``VMoE`` does with sizes, heads, resolutions and members."""

import copy
import math
import pickle

import pytest
import torch

from ironmoe.moe import Capacity, MoE, SoftMoE, VMoE, collect_aux_loss
from ironmoe.moe.vit.attend import attend
from ironmoe.moe.vit.placement import placement


def on_meta(name, **options):
    with torch.device("meta"):
        return VMoE.from_config(name, image_size=384, **options)


def millions(model):
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 1)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ViT-S/32", {}, 27.6), ("ViT-B/32", {}, 88.9), ("ViT-B+/32", {}, 129.0),
        ("ViT-B++/32", {}, 178.2),
        ("ViT-B+++/32", {}, 237.5), ("ViT-L/32", {}, 307.7),
        ("V-MoE-S/32", {"num_experts": 32}, 288.1),
        ("V-MoE-B/32", {"num_experts": 32}, 967.4), ("V-MoE-B/16", {"num_experts": 32}, 966.0),
        ("V-MoE-L/16", {"num_experts": 32}, 3428.6),
        ("V-MoE-B/16", {"representation_size": None}, 285.2),  # as released
        ("V-MoE-S/32", {"moe_layers": "last 2"}, 57.0),
    ],
)  # fmt: skip
def test_parameters_are_as_many_as_the_official_models_have(name, options, expected):
    assert millions(on_meta(name, **options)) == expected


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("V-MoE-B/16", {}, [1, 3, 5, 7, 9, 11]),
        ("V-MoE-S/32", {"moe_layers": "last 2"}, [5, 7]),
        ("V-MoE-B+/32", {"moe_layers": "last 2"}, [11, 13]),
        ("V-MoE-L/32", {"moe_layers": "every 6"}, [5, 11, 17, 23]),
        ("V-MoE-S/16", {"moe_layers": [0, -1]}, [0, 7]),
        ("ViT-H/14", {}, []),
    ],
)
def test_which_blocks_have_experts(name, options, expected):
    with torch.device("meta"):
        model = VMoE.from_config(name, **options)
    assert [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoE)] == expected


@pytest.mark.parametrize("depth", [1, 2, 7, 8, 12])
def test_placement_is_the_official_rule(depth):
    for n in range(1, depth + 1):
        assert placement(f"every {n}", depth, "layers") == list(range(n - 1, depth, n))
        if n <= len(range(1, depth, 2)):
            assert placement(f"last {n}", depth, "layers") == list(range(1, depth, 2))[-n:]
    assert (
        placement("all", depth, "layers") == list(range(depth))
        and placement((), depth, "layers") == []
    )
    for wrong in (f"last {depth // 2 + 1}", "every 0", "first 1", [depth], [-depth - 1], [0.5]):
        with pytest.raises(ValueError, match="layers"):
            placement(wrong, depth, "layers")


def test_losses_and_first_logits_are_the_papers():
    """Two experts take the GShard loss, because the load loss can be NaN there; the head starts at
    −log C."""
    options = {"image_size": 32, "num_classes": 7, "num_experts": 2, "top_k": 1, "moe_layers": [0]}
    model = VMoE.from_config("V-MoE-S/32", **options, router={"z_weight": 0.5})
    router = model.blocks[0].mlp.router
    assert (
        router.importance_weight,
        router.load_weight,
        router.balance_weight,
        router.z_weight,
    ) == (0, 0, 0.01, 0.5)
    model(torch.rand(2, 3, 32, 32))
    assert collect_aux_loss(model).isfinite()
    torch.testing.assert_close(
        model.eval()(torch.rand(1, 3, 32, 32)), torch.full((1, 7), -math.log(7))
    )
    assert model.pre_logits.out_features == 512


def small(**options):
    torch.manual_seed(0)
    model = VMoE(
        16, 4, 24, 3, 2, 32, 5, **{"moe_layers": (1, 2), "num_experts": 4, "channels": 1} | options
    ).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


KINDS = {
    "token": {}, "gap": {"classifier": "gap"}, "map": {"classifier": "map"},
    "representation": {"representation_size": 12},
    "dense": {"moe_layers": ()}, "ensemble": {"ensemble_size": 2},
    "capacity": {"capacity": Capacity(1.0, images_per_group=2)},
    "bfloat16 dispatch": {"dispatch_dtype": torch.bfloat16},
    "soft": {"make_moe": lambda: SoftMoE(24, 32, 4, 2, activation="gelu_tanh")},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_gradients_reach_everything(self, kind):
        model = small(**KINDS[kind]).train()
        (model(torch.rand(8, 1, 16, 16)).square().sum() + collect_aux_loss(model)).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_to_jax_and_back(self, kind):
        model = small(**KINDS[kind])
        options = {} if kind in ("dense", "soft") else {"top_k": 2}
        options |= {
            key: value
            for key, value in KINDS[kind].items()
            if key in ("capacity", "dispatch_dtype")
        }
        back = VMoE.from_jax(model.to_jax(), **options)
        images = torch.rand(4, 1, 16, 16)
        torch.testing.assert_close(back(images), model(images), rtol=0, atol=0)

    def test_copies(self, kind):
        model, images = small(**KINDS[kind]), torch.rand(4, 1, 16, 16)
        twins = [copy.deepcopy(model)] + (
            [] if kind == "soft" else [pickle.loads(pickle.dumps(model))]
        )  # a lambda does not pickle
        for twin in twins:
            assert torch.equal(twin(images), model(images))
        double = copy.deepcopy(model).double()
        torch.testing.assert_close(
            double(images.double()).float(), model(images), rtol=1e-3, atol=1e-3
        )

    def test_another_resolution(self, kind):
        model = small(**KINDS[kind])
        images = torch.rand(4, 1, 16, 16)
        before = model(images)
        assert model.resize(16) is model and torch.equal(model(images), before)
        assert model.resize(24)(torch.rand(4, 1, 24, 24)).shape == (4, 5)
        tokens = 36 + (model.cls is not None)
        assert model.pos_embedding.shape == (1, tokens, 24) and model.pos_embedding.requires_grad
        with pytest.raises(ValueError, match="patch_size must divide image_size = 18"):
            model.resize(18)


def test_an_ensemble_gives_log_probabilities_of_the_mean():
    model, images = small(ensemble_size=2), torch.rand(4, 1, 16, 16)
    members = model.member_logits(images)
    assert members.shape == (2, 4, 5) and not torch.allclose(members[0], members[1])
    torch.testing.assert_close(model(images), members.softmax(-1).mean(0).log())
    assert small().member_logits(images).shape == (1, 4, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VMoE.from_config("V-MoE-XL/16"), "SIZE one of S, B, B[+]"),
        (lambda: VMoE.from_config("resnet50"), "name must be ViT-SIZE/PATCH"),
        (
            lambda: VMoE.from_config("ViT-S/32", num_experts=8),
            "a dense ViT-S/32 takes no num_experts",
        ),
        (lambda: VMoE.from_config("ViT-S/15"), "patch_size must divide image_size = 224"),
        (lambda: small(ensemble_size=3), "ensemble_size must divide num_experts = 4, got 3"),
        (
            lambda: small(ensemble_size=2, moe_layers=()),
            "ensemble_size must be at least 1, and 1 without moe_layers",
        ),
        (lambda: small(representation_size=0), "representation_size must be at least 1"),
        (lambda: small(moe_layers="first 2"), 'moe_layers must be "all", "every n"'),
    ],
)
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bfloat16_rounds_once_on_cpu(autocast):
    q, k, v = torch.randn(3, 2, 4, 5, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", enabled=autocast):
        out = attend(q, k, v)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.bfloat16(), rtol=2**-7, atol=1e-6)
    dy = torch.randn_like(out)
    grads, wanted = (
        torch.autograd.grad(y, q, dy.to(y), retain_graph=True)[0] for y in (out, exact)
    )
    torch.testing.assert_close(grads, wanted.bfloat16(), rtol=2**-6, atol=1e-4)
