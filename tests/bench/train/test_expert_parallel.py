"""Training in two processes that share the experts, against one process with the same parts."""

from two_processes import run_in_processes

IMPORTS = """
import signal
import torch._dynamo  # an optimizer imports it
from ironmoe.attacks.training import AWP, PGDAT, TRADES, Alternating, Free
from ironmoe.bench.train.blocks import checkpoint_blocks
from trainings_on_ranks import Training, still
from worlds import torchrun
"""

TRAINING = """
torch.set_flush_denormal(True)
world = dist.get_world_size()

CASES = {  # the method, the number of parts, further options
    "PGD-AT": (lambda model: PGDAT(model, 0.1, steps=1, ramp_steps=3, mode="train"), 2, {}),
    "TRADES": (lambda model: TRADES(model, 0.1, steps=1), 2, {"checkpointing": checkpoint_blocks}),
    "alternating": (lambda model: Alternating(model, 0.1, steps=1), 2, {}),
    "Free": (lambda model: Free(model, 0.1, replays=2), 4, {}),
}
# the weights move along the gradient of the parts of all processes: here along that of the batch
perturbing = lambda model: AWP(PGDAT(still(model), 0.1, steps=1, start="clean"), gamma=0.1)
STEPS, MORE = range(2), range(2, 3)
# which one goes on, with how many parts; where it is alone, with how many
going_on, parts_in_all, parts_alone = ("Free", CASES["Free"][0]), 4, 4
SHARED = {"shared": {"expert_parallel": 2}, "sharded": {"expert_parallel": 2, "fsdp": True}}
resumed = SHARED | {"copied": {}}
if world > 2:  # each of two pairs has all experts; that is all there is to see
    CASES, STEPS, MORE = {}, range(1), range(1, 2)
    going_on, parts_alone, resumed = ("AWP", perturbing), 1, SHARED

def kinds_of(name):  # FSDP2 takes long, and most methods do not know of it
    return SHARED if name == "Free" else ["shared"]

found, numbers = {}, {}

def run(case, kind, training, steps=STEPS):
    found[case, kind] = training.run(steps), training.state()
    numbers[case] = training.numbers
    return training

for kind, options in SHARED.items():
    for name, (make_method, parts, more) in CASES.items():
        if kind in kinds_of(name):
            run(name, kind, Training(make_method, parts, **options | more))
    model = run("AWP", kind, Training(perturbing, world, **options)).model
    held = model.blocks[1].mlp.fc1.weight.to_local().shape[0]
    assert held == (1 if world > 2 and "fsdp" in options else 2), "each process has a part"
assert rank == 0 or not found["AWP", "sharded"][1]["model"], "process 0 alone has the state"

# what one kind of training has saved goes on in another
before = {"shared": "sharded", "sharded": "shared", "copied": "shared"}
for kind, options in resumed.items():
    training = Training(going_on[1], parts_in_all, **options)
    training.load(found[going_on[0], before[kind]][1], numbers[going_on[0]])
    run("resumed", kind, training, MORE)
dist.destroy_process_group()

if rank == 0:
    def compare(case, training, kinds, steps=STEPS):
        run(case, "alone", training, steps)
        want_losses, want = found[case, "alone"]
        for kind in kinds:
            losses, got = found[case, kind]
            where = f"{case}, {kind}: {{}}".format
            torch.testing.assert_close(losses, want_losses, rtol=1e-6, atol=0, msg=where)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8, msg=where)

    for name, (make_method, parts, more) in CASES.items():
        compare(name, Training(make_method, parts, **more), kinds_of(name))
    compare("AWP", Training(perturbing, 1), SHARED)
    training = Training(going_on[1], parts_alone)
    training.load(found[going_on[0], "shared"][1], numbers[going_on[0]])
    compare("resumed", training, resumed, MORE)
"""

# The command ends after the first epoch, and goes on with another number of processes.
COMMAND = """
import io, json, shutil
from contextlib import redirect_stdout
from functools import partial
import numpy as np
from safetensors.torch import load_file
from ironmoe.bench.attack import report
from ironmoe.bench.cli.app import app
from ironmoe.bench.train import run as command_run
from ironmoe.bench.train.report import page
from ironmoe.bench.train.trainer import Trainer

# pictures, and an attack of many steps with its checks, would take most of the time
page.draw_training = report.draw_evaluation = lambda facts: {}
command_run.Suite = partial(command_run.Suite, steps=2)
command_run.AttackOptions = partial(command_run.AttackOptions, checks=False)
labels = np.arange(40) % 4
pictures = np.random.default_rng(0).random((4, 8, 8))
np.savez("set.npz", images=pictures[labels] * 0.9, labels=labels)
with open("tiny.py", "w") as file:
    file.write('''
from ironmoe.moe import VMoE

class Wide(VMoE):  # in float64, so that nothing depends on the order of sums
    def forward(self, x):
        return super().forward(x.double())

def model():
    return Wide(8, 4, 16, 2, 2, 16, 4, moe_layers=(1,), num_experts=4, channels=1).double()
''')
sys.path.insert(0, os.getcwd())
words = ("train --data set.npz --model tiny:model --device cpu --batch-size 16 --eps 16 --steps 1 "
         "--epochs 2 --ema 0.9")

def command(out, *options):
    try:
        app([*words.split(), "--parts", "2", "--attack-images", "4", "--out", out, *options])
    except SystemExit as done:
        if done.code:
            os._exit(done.code)

write = Trainer._write
def after_an_epoch(do):
    def write_and_do(trainer):
        write(trainer)
        if trainer.numbers["epoch"] == 1:
            do()
    Trainer._write = write_and_do

def second_is_killed(number, out, *options):
    if number == 1:
        after_an_epoch(lambda: os.kill(os.getpid(), signal.SIGKILL))
    os.dup2(os.open(f"{out}-{number}.txt", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    command(out, *options)

def numbers_of(out):
    with open(f"{out}/training.json") as file:
        return json.load(file)["curves"]

SHARED = ("--expert-parallel", "2")
after_an_epoch(lambda: shutil.copytree("alone", "to-both"))  # as if it had ended then
command("alone", "--no-attack")
Trainer._write = write
first, second = torchrun(2, lambda number: second_is_killed(number, "to-one", *SHARED, "--fsdp"))
assert second == -signal.SIGKILL and first == 2
with open("to-one-0.txt") as file:
    said = " ".join(file.read().split())
assert "rank 1 (process " in said and "ended. What was finished is saved" in said, said
with redirect_stdout(io.StringIO()) as shown:
    command("to-one", "--no-attack")
said = " ".join(shown.getvalue().split())
assert "measured with expert_parallel: 2 there, 1 now; processes: 2 there, 1 now." in said, said
assert said.count("2 there, 1 now") == 2, said
assert torchrun(2, lambda number: command("to-both", *SHARED)) == [0, 0]
assert os.path.exists("to-both/attack/report.json"), "the same processes attack it"

alone, curves = load_file("alone/model.safetensors"), numbers_of("alone")
for out in ("to-one", "to-both"):
    other = load_file(f"{out}/model.safetensors")
    assert alone.keys() == other.keys()
    for name in alone:  # AdamW magnifies the rounding of a gradient that is 0
        torch.testing.assert_close(other[name], alone[name], rtol=1e-6, atol=1e-8, msg=name)
    for own, want in zip(numbers_of(out), curves, strict=True):
        assert abs(own["loss"] - want["loss"]) < 1e-6 and own["epoch"] == want["epoch"]
"""


def test_two_processes_that_share_the_experts_train_as_one(tmp_path):
    """All cases in one program, because imports take most of the time. The command comes first: a
    process that has left a group cannot start others."""
    run_in_processes(2, TRAINING, tmp_path, before=IMPORTS + COMMAND)


def test_two_pairs_of_processes_train_as_one(tmp_path):
    run_in_processes(4, TRAINING, tmp_path, before=IMPORTS)
