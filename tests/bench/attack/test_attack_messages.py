"""What ``ironmoe attack`` says where it cannot go on, and while it runs."""

import io
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ironmoe.attacks import Progress
from ironmoe.bench.attack import meter as attack_meter
from ironmoe.bench.cli.app import app
from ironmoe.bench.common.run_folder import RunFolder

SMALL = ["--all", "--attack-images", 36, "--device", "cpu", "--steps", 4]


def attack(*arguments, code=0):
    result = CliRunner().invoke(app, ["attack", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return " ".join(result.output.split())


def add(place, program):
    """Another model beside the linear one."""
    with (place / "small_models.py").open("a") as file:
        file.write(program)


def test_checkpoints_that_do_not_fit_are_named(moe, tmp_path):
    for arguments, message in (
        ((tmp_path / "nothing.safetensors", "--data", "digits"), "does not exist"),
        (
            (moe,),
            r"must have images of shape \(1, 8, 8\) for V-MoE, got \(1, 28, 28\); it was trained "
            r"on 'digits': use --data digits",
        ),
    ):
        assert re.search(
            message, attack(*arguments, "--device", "cpu", "--out", tmp_path / "no", code=2)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attack", "pgd,pdg"], "--attack must be names among fgsm, pgd, mifgsm, apgd-ce, "),
        (["--attack", ""], "--attack must be names among fgsm"),
        (["--attack", "cw"], "--norm must be L2 for --attack cw, got 'Linf'"),
        (
            ["--attack", "pgd,mifgsm", "--norm", "L1"],
            "--norm must be Linf or L2 for --attack mifgsm, got 'L1'",
        ),
        (["--norm", "L7"], "--norm must be one of Linf, L2, L1, got 'L7'"),
        (["--eps", "8,300"], "--eps is in units of 1/255 of the pixel range and at most 255 in L"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--routing", "blocked"], "--routing must be one of free, frozen, gates-only"),
        (
            ["--routing", "softened"],
            "--routing softened needs a model with experts, and Sequential has none",
        ),
        (
            ["--attack", "apgd-ce", "--alpha", "1"],
            "--alpha applies to pgd, mifgsm, not to --attack apgd-ce",
        ),
        (["--attack", "autoattack", "--restarts", "2"], "--restarts applies to pgd, "),
        (["--alpha", "-1"], "--alpha must be finite and above 0"),
        (["--alpha", "nan"], "--alpha must be finite and above 0"),
        (["--eps", "2,x"], "--eps must be numbers"),
        (["--alpha", "0"], "--alpha must be finite and above 0, got 0"),
        (["--alpha", "half"], "--alpha must be a number, such as 2 or 2/255, got 'half'"),
        (["--max-seconds", "0"], "'--max-seconds': must be above 0, got 0"),
        (["--eps", "0.5"], "write 0.5/255 for 0.5 steps of 255, or 127.5/255 for 0.5 of the"),
        (["--eps", "8/0"], "--eps must be numbers separated by commas, such as 2,4,8,12,16,24 or"),
        (["--eps", "255/8"], "--eps is in units of 1/255 of the pixel range and at most 255 in L"),
        (["--attack", "sqare"], "got 'sqare'; did you mean square?"),
        (["--norm", "Linfs"], "got 'Linfs'; did you mean Linf?"),
        (["--attack", "square", "--steps", "20"], "not to --attack square"),
        (["--attack", "pgd", "--queries", "20"], "--queries applies to square, not to"),
        (["--eot", "0"], "'--eot': must be at least 1, got 0"),
        (["--max-seconds", "nan"], "'--max-seconds': must be above 0, got nan"),
        (
            ["--attack", "cw", "--norm", "L2", "--steps", "0"],
            "'--steps': must be at least 1, got 0",
        ),
    ],
)
def test_bad_options_are_named(place, arguments, message):
    common = ["--model", "small_models:linear", "--data", "set.npz", "--all", "--device", "cpu"]
    assert message in attack(*common, *arguments, "--out", "run", code=2)
    assert not (place / "run").exists()


def test_a_model_that_says_nan_is_one_line(place):
    nan = (
        "def nan():\n    model = linear()\n    model[1].bias.data[0] = float('nan')\n    return "
        "model\n"
    )
    add(place, nan)
    message = attack(
        "--model",
        "small_models:nan",
        "--data",
        "set.npz",
        *SMALL,
        "--eps",
        "2",
        "--out",
        "run",
        code=2,
    )
    assert "--model small_models:nan: model must return finite logits, got NaN" in message


def test_a_model_without_a_graph_is_for_square(place, no_pictures):
    blind = (
        "class Blind(torch.nn.Module):\n    def forward(self, x):\n        return "
        "x.detach().flatten(1)[:, :4]\n"
    )
    add(place, blind)
    small = SMALL[: SMALL.index("--steps")]
    common = ["--model", "small_models:Blind", "--data", "set.npz", *small, "--eps", "2"]
    assert "logits without a graph; --attack square needs no gradients" in attack(
        *common, "--out", "run", code=2
    )
    output = attack(*common, "--attack", "square", "--queries", 4, "--eot", 3, "--out", "square")
    assert (
        "square (steps 4, restarts 1, each answer the mean of 3)" in output
        and "gradients)" not in output
    )


def test_a_budget_too_small_for_one_image_is_one_line(place):
    message = attack(
        "--model",
        "small_models:linear",
        "--data",
        "set.npz",
        *SMALL,
        "--eps",
        "2",
        "--max-forwards",
        1,
        "--out",
        "run",
        code=2,
    )
    assert (
        "--max-forwards 1 ended the evaluation before it began: the first batch, of 36 images, "
        "needs 36 for" in message
    )
    assert "and 72 more for a first question to the model" in message


def test_a_run_says_how_far_it_is_and_a_log_gets_a_line_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(attack_meter, "LINE_SECONDS", 0.0)
    for attacks, unit in ((2, "image × attack pairs"), (1, "images")):
        console = Console(file=io.StringIO(), width=80)
        meter = attack_meter.Meter(
            RunFolder(tmp_path / unit, {}, 0), console, world=1, images=40, attacks=attacks
        )
        total = 40 * attacks
        meter(Progress(0, total, attacks, 0, 5.0, 100, 0, "apgd-t", (40, 19_900), (2.0, 960.0)))
        meter(Progress(30, total, attacks, 20, 50.0, 9_000, 0, "fab", (10, 2_000), (0.1, 70.0), 9))
        meter(Progress(30, None, attacks, 20, 50.0, 9_000))
        assert console.file.getvalue().splitlines() == [
            f"attack: 0/{total} {unit}, apgd-t, 100 of at most 20k passes, 2 s to 16 min left",
            f"attack: 30/{total} {unit}, fab, 9000 of at most 11k passes, "
            "about 9 s left (1 to 70 s)",
            f"attack: 30/{total} {unit}, clean predictions, 9000 passes",
        ]
        assert (
            meter.save() == 50
            and attack_meter.Meter(
                meter.folder, console, world=1, images=40, attacks=attacks
            ).seconds_before
            == 50
        )


def test_counts_of_passes_are_short():
    counts = {950: "950", 9999: "9999", 12_345: "12k", 999_999: "1.0M", 1_234_567: "1.2M"}
    assert [attack_meter.short(count) for count in counts] == list(counts.values())


def test_at_most_is_rounded_up_and_is_only_said_of_what_this_process_knows(tmp_path):
    for world, passes in ((1, "12k of at most 13k passes"), (2, "24k of about 25k passes")):
        console = Console(file=io.StringIO(), width=80)
        folder = RunFolder(tmp_path / str(world), {}, 0)
        meter = attack_meter.Meter(folder, console, world=world, images=40, attacks=1)
        meter.printed = -attack_meter.LINE_SECONDS
        meter(Progress(0, 40, 1, 0, 5.0, 12_100, 0, "apgd-t", (40, 200), (2.0, 960.0)))
        assert f"apgd-t, {passes}, 2 s to 16 min left" in console.file.getvalue()
