"""Training in two processes, data parallel and under FSDP2, against one process with the same
parts."""

import re

import pytest
import torch
from torch import nn
from two_processes import run_in_two_processes

from ironmoe.bench.common.processes import backend
from ironmoe.bench.train.full_state import full_state, load_optimizer_state, optimizer_state
from ironmoe.moe import VMoE
from ironmoe.moe.distributed import clip_grad_norm_
from ironmoe.moe.parallel.blocks import blocks

IMPORTS = """
import signal
import torch._dynamo  # an optimizer imports it
from torch import nn
from ironmoe.attacks.training import AWP, PGDAT, TRADES, Alternating, Free
from ironmoe.bench.common import processes as common
from ironmoe.bench.common.processes import OWN, processes
from ironmoe.bench.train.gradients import MeanGradients
from ironmoe.bench.train.parallel import average_running_statistics, prepared
from ironmoe.moe.distributed import clip_grad_norm_
from trainings_on_ranks import CPU, Training, images, make, still
from worlds import torchrun
"""

TRAINING = """
torch.set_flush_denormal(True)

def every_kind_of_buffer_comes_from_process_0():
    model = nn.BatchNorm1d(2)
    for number, dtype in enumerate((torch.int16, torch.bool, torch.complex64, torch.bfloat16)):
        model.register_buffer(f"buffer{number}", torch.full((2, 3), rank, dtype=dtype).t())
    prepared(model, fsdp=False, device=CPU)
    assert not any(buffer.any() for name, buffer in model.named_buffers() if "buffer" in name)

def average_gradients(model):
    gradients = MeanGradients(model)
    gradients.add()
    gradients.put(model.parameters())

def some_gradients_are_missing():
    model = prepared(nn.ModuleDict({name: nn.Linear(2, 2) for name in "abc"}), fsdp=False,
                     device=CPU)
    inputs = torch.full((1, 2), 1.0 + rank)
    model["a"](inputs).sum().backward()
    if rank:
        model["b"](inputs).sum().backward()
    average_gradients(model)
    assert model["a"].weight.grad.eq(1.5).all() and model["b"].weight.grad.eq(1.0).all()
    assert model["c"].weight.grad is None

def running_statistics_are_averaged():
    model = prepared(nn.BatchNorm1d(1, momentum=1.0), fsdp=False, device=CPU)
    model(torch.full((4, 1), 2.0 * rank)).sum().backward()
    average_running_statistics(model)
    assert model.running_mean.item() == 1.0 and model.num_batches_tracked == 1

def clipped_as_whole_gradients():
    norms = []
    for fsdp in (False, True):
        model = prepared(make().float(), fsdp=fsdp, device=CPU).eval()
        model(images().float()).square().sum().backward()
        average_gradients(model)
        norms.append([clip_grad_norm_(model, 0.5), clip_grad_norm_(model, 9.0)])
    assert norms[0][0].float() == norms[1][0].float() > 0.5
    torch.testing.assert_close(norms[1][1], torch.tensor(0.5).double(), rtol=1e-5, atol=0)

every_kind_of_buffer_comes_from_process_0()
some_gradients_are_missing()
running_statistics_are_averaged()
clipped_as_whole_gradients()

CASES = {  # the method, the number of parts
    "PGD-AT": (lambda model: PGDAT(model, 0.1, steps=1, ramp_steps=3, mode="train"), 2),
    "TRADES": (lambda model: TRADES(model, 0.1, steps=1), 2),
    "alternating": (lambda model: Alternating(model, 0.1, steps=1), 2),
    "Free": (lambda model: Free(model, 0.1, replays=2), 4),
}
STEPS, MORE = range(2), range(2, 3)
found = {}
for name, (make_method, parts) in CASES.items():
    for fsdp in (False, True):
        training = Training(make_method, parts, fsdp=fsdp)
        found[name, fsdp] = training.run(STEPS), training.state()
numbers = training.numbers
assert rank == 0 or not found["Free", True][1]["model"], "process 0 alone has the state"

# what one kind of training has saved goes on in the other
for fsdp in (False, True):
    training = Training(CASES["Free"][0], parts=4, fsdp=fsdp)
    training.load(found["Free", not fsdp][1], numbers)
    found["resumed", fsdp] = training.run(MORE), training.state()

# weights move along the gradient of the parts of all processes: here along that of the batch
def perturbing(model):
    return AWP(PGDAT(still(model), 0.1, steps=1, start="clean"), gamma=0.1)

def perturbed(fsdp, parts):
    training = Training(perturbing, parts, fsdp=fsdp)
    return training.run(STEPS), training.state()

for fsdp in (False, True):
    found["AWP", fsdp] = perturbed(fsdp, 2)

def single_precision():
    training = Training(CASES["TRADES"][0], parts=4, dtype=torch.float32)
    training.run(STEPS)
    return training.state()["model"]

found["float32"] = single_precision()
dist.destroy_process_group()

if rank == 0:
    def compare(case, losses, state):
        for fsdp in (False, True):
            got_losses, got = found[case, fsdp]
            where = f"{case}, fsdp={fsdp}: {{}}".format
            torch.testing.assert_close(got_losses, losses, rtol=1e-6, atol=0, msg=where)
            torch.testing.assert_close(got, state, rtol=1e-6, atol=1e-8, msg=where)

    for name, (make_method, parts) in CASES.items():
        alone = Training(make_method, parts=parts)
        compare(name, alone.run(STEPS), alone.state())
    going_on = Training(CASES["Free"][0], parts=4)
    going_on.load(found["Free", True][1], numbers)
    compare("resumed", going_on.run(MORE), going_on.state())
    compare("AWP", *perturbed(False, 1))
    torch.testing.assert_close(found["float32"], single_precision(), rtol=0, atol=0)
"""

# Each pair of processes is started, fails, and ends.
FAILURES = """
def fail(kind):
    # how long one waits for the other, which a busy machine may hold up
    common.SAME_SECONDS = 60.0 if kind == "raised by all" else 0.1
    with processes(torch.device("cpu")) as group:
        model = prepared(nn.Linear(2, 2), fsdp=kind == "killed", device=torch.device("cpu"))
        for step in range(3):
            if group.rank == 1 and step == 2 and kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "raised by all" or group.rank == 1 and step == 2:
                raise ValueError("bad luck")
            model(torch.ones(1, 2)).sum().backward()
            average_running_statistics(model)
            gradients = MeanGradients(model)
            gradients.add()
            gradients.put(model.parameters())

for kind in ("raised", "killed", "raised by all"):
    def failing(number):
        try:
            fail(kind)
        except Exception as error:
            with open(f"{kind}-{number}", "w") as file:
                file.write(f"{type(error).__name__}: {error}")
                file.write(" (own)" if OWN in getattr(error, "__notes__", ()) else "")
    torchrun(2, failing)
"""

# The command, in two processes with one part each, and in one with two.
COMMAND = """
import numpy as np
from safetensors.torch import load_file
from ironmoe.bench.cli.app import app
from ironmoe.bench.train import watch
from ironmoe.bench.train.report import page

page.draw_training = lambda facts: {}
labels = np.arange(40) % 4
pictures = np.random.default_rng(0).random((4, 8, 8))
np.savez("set.npz", images=pictures[labels] * 0.9, labels=labels)
words = "train --data set.npz --device cpu --batch-size 16 --eps 16 --method fgsm-rs --epochs 1"

def command(out, *options):
    try:
        app([*words.split(), "--parts", "2", "--no-attack", "--out", out, *options])
    except SystemExit as done:
        if done.code:
            os._exit(done.code)

def tripping_alone(number):
    check = watch.OverfittingGuard.check
    watch.OverfittingGuard.check = lambda guard: check(guard)._replace(tripped=number == 1)
    command("halt")

command("alone")
alone = load_file("alone/model.safetensors")
for options in ((), ("--fsdp",)):
    out = "".join(["both", *options])
    assert torchrun(2, lambda number: command(out, *options)) == [0, 0]
    both = load_file(f"{out}/model.safetensors")
    assert alone.keys() == both.keys()
    close = 1e-4 if options else 0  # FSDP2 may round a last bit in another way
    for name in alone:
        torch.testing.assert_close(both[name], alone[name], rtol=close, atol=close, msg=name)
assert torchrun(2, tripping_alone) == [0, 0]
assert "stopped: the guard of another process tripped" in open("halt/report.html").read()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both programs ran; one after the other, because imports take most of the time."""
    folder = tmp_path_factory.mktemp("processes")
    run_in_two_processes(TRAINING, folder, before=IMPORTS + FAILURES + COMMAND)
    return folder


def test_two_processes_train_as_one(folder):
    """The program compares losses, weights and states."""
    assert (folder / "program.py").exists()


def test_when_one_process_fails_the_others_end_and_say_why(folder):
    """What is a process's own it prints itself; what all have, the first prints."""
    goes_on = "What was finished is saved; the same command goes on from there (own)"
    said = {
        path.name: re.sub(r"\(process \d+ on \S+\)", "(process N)", path.read_text())
        for path in folder.iterdir()
        if "ed" in path.name
    }
    assert said == {
        "raised-0": f"OtherProcessEnded: process 1 failed: ValueError: bad luck. {goes_on}",
        "raised-1": "ValueError: bad luck (own)",
        "killed-0": f"OtherProcessEnded: rank 1 (process N) ended. {goes_on}",
        "raised by all-0": "ValueError: bad luck (own)",
        "raised by all-1": "ValueError: bad luck",
    }


def test_each_device_has_its_library():
    assert backend(torch.device("cuda", 1)) == "cpu:gloo,cuda:nccl"
    assert backend(torch.device("cpu")) == "gloo"


def test_a_process_alone_clips_as_torch_does():
    torch.manual_seed(0)
    model, peer = nn.Linear(3, 2), nn.Linear(3, 2)
    for each in (model, peer):
        for parameter in each.parameters():
            parameter.grad = torch.arange(float(parameter.numel())).view_as(parameter)
    norm = clip_grad_norm_(model, 0.7)
    want = nn.utils.clip_grad_norm_(peer.parameters(), 0.7)
    torch.testing.assert_close(norm.float(), want)
    torch.testing.assert_close(model.weight.grad, peer.weight.grad)


def test_parameters_without_a_state_stay_so():
    """torch's own way loads a state of zeros, and a step that was made, into such parameters."""
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer_state(model, optimizer)
    assert sorted(state)[:2] == ["0.bias/exp_avg", "0.bias/exp_avg_sq"] and len(state) == 6

    other = torch.optim.AdamW(model.parameters())
    load_optimizer_state(model, other, state)
    assert set(other.state) == set(model[0].parameters())
    torch.testing.assert_close(optimizer_state(model, other), state)
    with pytest.raises(ValueError, match=r"got '7\.bias', which is none of its 4"):
        load_optimizer_state(model, other, {"7.bias/step": torch.ones(())})


def test_names_are_those_of_the_plain_model():
    model = nn.Sequential(nn.Linear(2, 2))
    names = list(model.state_dict())
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert list(full_state(compiled)) == names
    assert list(optimizer_state(compiled, optimizer)) == [f"{n}/momentum_buffer" for n in names]


def test_blocks_are_the_members_of_the_outermost_lists_but_not_experts():
    model = VMoE(8, 4, 16, 2, 2, 32, 3, moe_layers=(1,), num_experts=4)
    assert list(blocks(model)) == list(model.blocks)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)))
    lists = nn.ModuleDict(
        {"layers": layers, "experts": nn.ModuleList(nn.Linear(2, 2) for _ in "ab")}
    )
    assert list(blocks(lists)) == list(layers)
