"""A patched model saved whole runs where nobody has called ``register``."""

import copy
import pickle
import subprocess
import sys

import hf_families
import pytest
import torch

from ironmoe.moe.adapters.huggingface_routing import expert_sites
from ironmoe.moe.huggingface import register, unpatch

pytest.importorskip("transformers", minversion="5.17")
build, patched, running = hf_families.build, hf_families.patched, hf_families.running
IDS = torch.randint(3, hf_families.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])

LOAD = """
import pickle, sys, torch
from transformers.integrations.moe import ExpertsInterface

given = torch.load(sys.argv[1])
results = {}
for name in sys.argv[2:]:
    ExpertsInterface._global_mapping.pop("ironmoe", None)
    if name.endswith(".pickle"):
        with open(name, "rb") as file:
            part = pickle.load(file)
    else:
        part = torch.load(name, weights_only=False)
    y = part(**given["experts" if "experts" in name else "model"])
    results[name] = getattr(y, "logits", getattr(y, "last_hidden_state", y)).detach()
torch.save(results, sys.argv[1])
"""


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_models_saved_whole_run_in_a_process_that_knows_nothing_of_ironmoe(name, tmp_path):
    model = patched(build(name))
    experts = next(expert_sites(model)).experts
    registered = running(build(name), "ironmoe")
    register()
    registered(IDS)
    given = {
        "model": {"input_ids": IDS, "attention_mask": MASK},
        "experts": {
            "hidden_states": torch.randn(5, 32),
            "top_k_index": torch.randint(8, (5, 2)),
            "top_k_weights": torch.rand(5, 2),
        },
    }
    expected = {}
    saves = {
        "whole": model, "inner": model.model, "experts": experts, "copied": copy.deepcopy(model),
        "registered": registered,
    }  # fmt: skip
    for file, part in saves.items():
        y = part(**given["experts" if file == "experts" else "model"])
        y = getattr(y, "logits", getattr(y, "last_hidden_state", y))
        expected[str(tmp_path / f"{file}.pt")] = expected[str(tmp_path / f"{file}.pickle")] = y
        torch.save(part, tmp_path / f"{file}.pt")
        (tmp_path / f"{file}.pickle").write_bytes(pickle.dumps(part))
    torch.save(given, tmp_path / "inputs")

    command = [sys.executable, "-c", LOAD, str(tmp_path / "inputs"), *expected]
    subprocess.run(command, check=True, capture_output=True, text=True)
    results = torch.load(tmp_path / "inputs")
    assert results.keys() == expected.keys()
    for file, y in expected.items():
        torch.testing.assert_close(results[file], y, msg=lambda text, file=file: f"{file}: {text}")


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_is_unpatched_on_its_own(how):
    model = build("mixtral")
    expected = model(IDS, attention_mask=MASK).logits
    ours = patched(model)
    twin = copy.deepcopy(ours) if how == "copied" else pickle.loads(pickle.dumps(ours))
    unpatch(twin)
    assert torch.equal(twin(IDS, attention_mask=MASK).logits, expected)
    assert next(expert_sites(twin)).experts.config._experts_implementation == "eager"
    assert not twin._forward_hooks and ours._forward_hooks
    assert next(expert_sites(ours)).experts.config._experts_implementation == "ironmoe"
