"""``robustbench_evaluate``: RobustBench's call, and the numbers of the standard AutoAttack."""

import json
import sys
import warnings
from enum import Enum
from fractions import Fraction

import cifar_files
import numpy as np
import pytest
import torch
from libraries import stand_in
from PIL import Image
from torch import nn

from ironmoe.attacks import AutoAttack, robustbench_evaluate
from ironmoe.attacks.robustbench import benchmark
from ironmoe.attacks.robustbench.cifar import cifar_test_set
from ironmoe.attacks.robustbench.imagenet import PREPARATIONS

COUNT = 20
EPS = 0.12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder with a small CIFAR-10, in which two labels are wrong."""
    folder = tmp_path_factory.mktemp("data")
    labels = [place % 10 for place in range(COUNT)]
    labels[3], labels[14] = 9, 0
    cifar_files.write(folder, "cifar10", cifar_files.pixels(COUNT), labels)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return cifar_test_set("cifar10", folder)


@pytest.fixture(scope="module")
def model(data):
    """A class is the picture that an image is nearest to; some pictures are given to be nearer than
    they are, so that at EPS a part of the images falls."""
    pictures = data[0][:10].flatten(1) - 0.5
    linear = nn.Linear(3072, 10)
    with torch.no_grad():
        linear.weight.copy_(pictures)
        shift = -0.5 * pictures.square().sum(1) - 0.5 * pictures.sum(1)
        linear.bias.copy_(shift + torch.linspace(-30, 30, 10))
    return nn.Sequential(nn.Flatten(), linear).eval()


class Short(AutoAttack):
    """The same attacks, which end early."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 5
        self.square.n_queries = 20


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(benchmark, "AutoAttack", Short)


def share_right(model, images, labels):
    return float((model(images).argmax(1) == labels).double().mean())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("threat_model", "eps"), [("Linf", EPS), ("L2", 5.0)])
def test_the_numbers_are_those_of_the_standard_evaluation(model, data, folder, threat_model, eps):
    found = robustbench_evaluate(
        model, 17, "cifar10", threat_model, False, None, folder, eps=eps, batch_size=6
    )
    images, labels = data[0][:17], data[1][:17]
    final = Short(model, threat_model, eps).run_standard_evaluation(images, labels)
    clean, robust = share_right(model, images, labels), share_right(model, final, labels)
    assert found == pytest.approx((clean, robust), abs=1e-12)
    assert 0 < robust < clean < 1
    assert all(type(number) is float for number in found)


def test_it_is_the_standard_autoattack(model, folder, monkeypatch):
    made = []

    class Noted(AutoAttack):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(benchmark, "AutoAttack", Noted)
    clean, robust = robustbench_evaluate(model, 10, data_dir=folder, eps=0.3)  # nothing holds
    assert clean > 0.5 and robust == 0
    official = AutoAttack(model, "Linf", 0.3)
    assert repr(made[0].stages) == repr(official.stages)


@pytest.mark.usefixtures("short")
def test_data_may_be_given(model, data, folder, tmp_path):
    on_disk = robustbench_evaluate(model, 13, data_dir=folder, eps=EPS)
    images, labels = data
    batches = [(images[first : first + 3], labels[first : first + 3]) for first in range(0, 20, 3)]
    nowhere = tmp_path / "nowhere"
    for given in (data, batches, iter(batches)):
        assert robustbench_evaluate(model, 13, data_dir=nowhere, eps=EPS, data=given) == on_disk

    read = []
    lazy = (read.append(batch) or batch for batch in batches)
    robustbench_evaluate(model, 6, eps=EPS, data=lazy, dataset="imagenet")
    assert len(read) == 2  # no more than are needed
    all_of_them = robustbench_evaluate(model, data_dir=folder, eps=EPS)
    assert all_of_them[0] == share_right(model, *data)


@pytest.mark.usefixtures("short")
def test_the_file_about_a_model_is_that_of_robustbench(model, data, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model_info" / "cifar10" / "Linf" / "Mine.json"

    def run(count):
        return robustbench_evaluate(
            model, count, to_disk=True, model_name="Mine", data_dir=folder, eps=EPS
        )

    clean, robust = run(9)
    written = json.loads(path.read_text())
    assert list(written) == [
        *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset"),
        *("venue", "architecture", "eps", "clean_acc", "reported", "corruptions_acc"),
        *("corruptions_acc_3d", "corruptions_mce", "corruptions_mce_3d", "autoattack_acc"),
        "footnote",
    ]
    said = {name: value for name, value in written.items() if value is not None}
    assert said == {
        "dataset": "cifar10",
        "eps": EPS,
        "clean_acc": str(round(100 * clean, 2)),
        "autoattack_acc": str(round(100 * robust, 2)),
    }

    path.write_text(json.dumps(written | {"authors": "me", "clean_acc": "1.0"}))
    clean, _ = run(7)
    again = json.loads(path.read_text())
    assert again["authors"] == "me" and again["clean_acc"] == str(round(100 * clean, 2))
    assert [file.name for file in path.parent.iterdir()] == ["Mine.json"]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", [np.float32, np.float64, Fraction])
def test_the_file_about_a_model_takes_eps_of_any_kind(model, folder, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    eps = kind(0.125)
    options = {"to_disk": True, "model_name": "Mine", "data_dir": folder, "eps": eps}
    robustbench_evaluate(model, 2, **options)
    (path,) = tmp_path.glob("model_info/*/*/*")
    assert json.loads(path.read_text())["eps"] == 0.125


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_file_that_cannot_be_added_to_is_named_before_the_attack(
    model, folder, tmp_path, monkeypatch, content
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "AutoAttack", None)  # nothing gets so far
    path = tmp_path / "model_info" / "cifar10" / "Linf" / "Mine.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"model_info/cifar10/Linf/Mine\.json must hold"):
        robustbench_evaluate(model, to_disk=True, model_name="Mine", data_dir=folder, eps=EPS)


@pytest.mark.usefixtures("short")
def test_the_log_and_the_state_are_those_of_autoattack(model, data, folder, tmp_path, capsys):
    path = tmp_path / "log.txt"
    options = {"data_dir": folder, "eps": EPS, "aa_state_path": tmp_path / "state"}
    clean, robust = robustbench_evaluate(model, 8, log_path=path, **options)
    assert capsys.readouterr().out == ""
    lines = path.read_text().splitlines()
    assert lines[1] == f"initial accuracy: {clean:.2%}"
    assert lines[-1].startswith(f"robust accuracy: {robust:.2%}")

    assert robustbench_evaluate(model, 8, verbose=True, **options) == (clean, robust)
    assert f"robust accuracy: {robust:.2%}" in capsys.readouterr().out
    assert list((tmp_path / "state").glob("journal-*.jsonl"))

    # Of a stream the initial accuracy is known at the end alone.
    stream = [(data[0][:5], data[1][:5]), (data[0][5:8], data[1][5:8])]
    robustbench_evaluate(model, 8, eps=EPS, data=stream, log_path=tmp_path / "stream.txt")
    lines = (tmp_path / "stream.txt").read_text().splitlines()
    after = next(place for place, line in enumerate(lines) if "robust accuracy after" in line)
    assert lines[after - 1] == f"initial accuracy: {clean:.2%}"
    assert lines[-1].startswith(f"robust accuracy: {robust:.2%}")


class Moved(nn.Module):
    """It notes where it is sent."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.went_to = []

    def to(self, device):
        self.went_to.append(str(device))
        return super().to(device)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.usefixtures("short")
def test_a_module_goes_to_the_device_and_back(model, folder):
    moved = Moved(model).train()
    stays = robustbench_evaluate(moved, 4, data_dir=folder, eps=EPS)
    assert moved.went_to == []
    assert robustbench_evaluate(moved, 4, data_dir=folder, eps=EPS, device="cpu") == stays
    assert moved.went_to == ["cpu", "cpu"] and moved.training
    assert robustbench_evaluate(lambda x: model(x), 4, data_dir=folder, eps=EPS) == stays


class RobustBenchName(Enum):
    """As RobustBench's BenchmarkDataset and ThreatModel."""

    cifar_10 = "cifar10"
    L2 = "L2"


@pytest.mark.usefixtures("short")
def test_names_may_be_those_of_an_enum(model, folder):
    plain = robustbench_evaluate(model, 4, "cifar10", "L2", data_dir=folder, eps=2.0)
    names = (RobustBenchName.cifar_10, RobustBenchName.L2)
    assert robustbench_evaluate(model, 4, *names, data_dir=folder, eps=2.0) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": None}, r"eps must be given for threat_model='Linf', got None; .* eps=8/255"),
        ({"eps": None, "threat_model": "L2"}, r"got None; the leaderboard of cifar10 has eps=0\.5"),
        ({"eps": None, "dataset": "imagenet"}, r"of imagenet has eps=4/255"),
        ({"threat_model": "corruptions"}, "without corruptions_data_dir, got threat_model='corrup"),
        ({"threat_model": "corruptions_3d"}, "common corruptions are images on disk and no attack"),
        ({"corruptions_data_dir": "x"}, "got corruptions_data_dir='x': common corruptions"),
        ({"threat_model": "L1"}, "as in RobustBench, got 'L1'; AutoAttack itself takes other norm"),
        ({"dataset": "mnist"}, r"dataset must be one of \('cifar10', 'cifar100', 'imagenet'\), go"),
        ({"to_disk": True}, "model_name must be the name of a file for to_disk, got None"),
        ({"to_disk": True, "model_name": "../x"}, "model_name must be the name of a file"),
        ({"n_examples": 0}, "n_examples must be at least 1, got 0"),
        ({"dataset": "imagenet"}, "n_examples must be at most 5000 for imagenet, got 10000"),
        (
            {"dataset": "imagenet", "n_examples": 5},
            "preprocessing must be one of .* for imagenet, or a function .* got None; .*model_name",
        ),
        (
            {"dataset": "imagenet", "n_examples": 5, "preprocessing": "Crop7"},
            r"preprocessing must be one of \('Res256Crop224', .*got 'Crop7'",
        ),
        ({"preprocessing": "Crop288"}, "must be None for cifar10, whose images are taken as they"),
        ({"preprocessing": "Crop288", "data": ()}, "preprocessing must be None for data="),
    ],
)
def test_what_is_not_evaluated_is_refused_by_name(model, folder, options, message):
    with pytest.raises(ValueError, match=message):
        robustbench_evaluate(model, **{"eps": EPS, "data_dir": folder, **options})


def test_data_that_are_no_batch_are_named_by_evaluate(model, folder):
    for wrong in ((), [1]):
        with pytest.raises(TypeError, match=r"data must be \(images, labels\), or batches of them"):
            robustbench_evaluate(model, eps=EPS, data=wrong)
    with pytest.raises(FileNotFoundError, match=r"cifar-100-python/test, got .* download https"):
        robustbench_evaluate(model, eps=EPS, dataset="cifar100", data_dir=folder)


def test_fewer_images_than_were_asked_for_are_said(model):
    data = torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    with pytest.warns(UserWarning, match="n_examples=9, but accuracies are of 4 images: there are"):
        robustbench_evaluate(model, 9, eps=EPS, data=data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        robustbench_evaluate(model, 4, eps=EPS, data=data)
        robustbench_evaluate(model, eps=EPS, data=data)


def test_robustbench_itself_gives_the_same_numbers(model, folder):
    """Where it is installed, on its own attacks. No image is near the radius at which it falls, so
    that no seed decides."""
    robustbench = pytest.importorskip("robustbench.eval")
    if not hasattr(robustbench, "benchmark"):
        pytest.skip("the release of RobustBench on PyPI has no benchmark")
    options = {"n_examples": 10, "data_dir": str(folder), "eps": 0.3}
    assert robustbench_evaluate(model, **options) == pytest.approx(
        robustbench.benchmark(model, **options)
    )


FIRST = [("n09468604", 15253), ("n02823750", 20685), ("n09472597", 39611)]
"""RobustBench's first three images."""


def write_imagenet(folder, **saved):
    """Noise in place of them, (3, H, W) each as the file has it."""
    random = np.random.default_rng(0)
    pictures = []
    for synset, number in FIRST:
        pixels = random.integers(0, 256, (300, 290, 3), dtype=np.uint8)
        path = folder / "val" / synset / f"ILSVRC2012_val_{number:08d}.JPEG"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path, "PNG", **saved)  # without loss, whatever its name says
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    return torch.stack(pictures)


@pytest.fixture(scope="module")
def pooled():
    """A model of ImageNet's classes."""
    torch.manual_seed(0)
    pool = torch.nn.AdaptiveAvgPool2d(4)
    return torch.nn.Sequential(pool, torch.nn.Flatten(), torch.nn.Linear(48, 1000)).eval()


def middle(picture):
    """The preparation "Crop288" as a function."""
    pixels = np.asarray(picture)[6:294, 1:289]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


def test_imagenet_is_read_from_its_files_as_they_are_attacked(pooled, tmp_path):
    """RobustBench's first three images, whole and by its own preparation or a function."""
    x = write_imagenet(tmp_path)[:, :, 6:294, 1:289]
    given = robustbench_evaluate(
        pooled, 3, "imagenet", eps=EPS, data=(x, torch.tensor([979, 441, 980]))
    )
    for preprocessing in ("Crop288", middle):
        read = robustbench_evaluate(
            pooled, 3, "imagenet", eps=EPS, data_dir=tmp_path, preprocessing=preprocessing
        )
        assert read == given


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda pixels: pixels.numpy(), r"ndarray \(3, 288, 288\) of float32"),
        (lambda pixels: pixels.permute(1, 2, 0), r"Tensor \(288, 288, 3\) of float32"),
        (lambda pixels: pixels[:1], r"Tensor \(1, 288, 288\) of float32"),
        (lambda pixels: (255 * pixels).int(), r"Tensor \(3, 288, 288\) of int32"),
        (lambda pixels: None, "got NoneType"),
    ],
)
def test_a_function_that_returns_no_picture_is_named(pooled, tmp_path, change, got):
    write_imagenet(tmp_path)
    options = {"data_dir": tmp_path, "preprocessing": lambda picture: change(middle(picture))}
    with pytest.raises(TypeError, match=rf"preprocessing must return a tensor \(3, H, W\).*{got}"):
        robustbench_evaluate(pooled, 3, "imagenet", eps=EPS, **options)


class Seen(Exception):
    """The data that an evaluation would be made of."""


@pytest.fixture
def seen(monkeypatch):
    """The images that an evaluation reads, (N, 3, H, W), and how they are prepared."""

    def stop(adversary, data, **options):
        raise Seen(data)

    def of(model, **options):
        with pytest.raises(Seen) as caught:
            robustbench_evaluate(model, 3, "imagenet", eps=EPS, **options)
        (stream,) = caught.value.args
        return torch.cat([pixels for pixels, *_ in stream]), stream.pipeline

    monkeypatch.setattr(benchmark, "standard_report", stop)
    return of


def test_images_are_not_turned_as_robustbench_does_not_turn_them(pooled, tmp_path, seen):
    turned = Image.Exif()
    turned[0x0112] = 6
    x = write_imagenet(tmp_path, exif=turned)
    first = next(tmp_path.glob("val/*/*.JPEG"))
    assert Image.open(first).getexif()[0x0112] == 6
    pixels, _ = seen(pooled, data_dir=tmp_path, preprocessing="Crop288")
    torch.testing.assert_close(pixels, x[:, :, 6:294, 1:289], rtol=0, atol=1e-7)

    # A JPEG, and what Pillow alone makes of it.
    Image.fromarray(np.full((300, 300, 3), (9, 99, 199), np.uint8)).save(first, exif=turned)
    stored = np.asarray(Image.open(first).convert("RGB").crop((6, 6, 294, 294)))
    place = next(i for i, (synset, _) in enumerate(FIRST) if synset == first.parent.name)
    pixels, _ = seen(pooled, data_dir=tmp_path, preprocessing="Crop288")
    assert np.array_equal((pixels[place] * 255).round().permute(1, 2, 0).numpy(), stored)


class Dataset(Enum):
    imagenet = "imagenet"


class Threat(Enum):
    Linf = "Linf"


@pytest.fixture(params=["GitHub", "PyPI"])
def zoo(monkeypatch, request):
    """A small robustbench, with an entry of its table, and a model that timm knows; the one on PyPI
    is older and knows fewer ways."""
    is_old = request.param == "PyPI"
    transforms = {name: object() for name in [*PREPARATIONS][: 2 if is_old else None]}
    models = {"Salman2020Do_R18": transforms["Res256Crop224"], "Of_timm": middle}

    def get_preprocessing(dataset, threat_model, model_name, preprocessing):
        assert (dataset, threat_model, preprocessing) == (Dataset.imagenet, Threat.Linf, None)
        if is_old and model_name not in models:
            raise Exception("Preprocessing should be specified")
        return models[model_name]

    stand_in(monkeypatch, "robustbench")
    stand_in(
        monkeypatch,
        "robustbench.data",
        PREPROCESSINGS=transforms,
        get_preprocessing=get_preprocessing,
    )
    stand_in(monkeypatch, "robustbench.model_zoo")
    stand_in(
        monkeypatch, "robustbench.model_zoo.enums", BenchmarkDataset=Dataset, ThreatModel=Threat
    )


@pytest.mark.usefixtures("zoo")
def test_a_model_of_the_zoo_has_the_preprocessing_of_robustbenchs_table(pooled, tmp_path, seen):
    x = write_imagenet(tmp_path)
    _, pipeline = seen(pooled, data_dir=tmp_path, model_name="Salman2020Do_R18")
    assert pipeline is PREPARATIONS["Res256Crop224"]
    pixels, pipeline = seen(pooled, data_dir=tmp_path, model_name="Of_timm")
    assert pipeline.transform is middle
    torch.testing.assert_close(pixels, x[:, :, 6:294, 1:289], rtol=0, atol=1e-7)

    _, named = seen(
        pooled, data_dir=tmp_path, model_name="Salman2020Do_R18", preprocessing="Crop288"
    )
    assert named is PREPARATIONS["Crop288"]
    message = r"preprocessing must be one of .*zoo alone, and there is no 'Mine' among those for im"
    with pytest.raises(ValueError, match=message):
        robustbench_evaluate(pooled, 3, "imagenet", eps=EPS, data_dir=tmp_path, model_name="Mine")


def test_without_robustbench_the_error_says_why_preprocessing_must_be_given(
    pooled, tmp_path, monkeypatch
):
    for known in [name for name in sys.modules if name.startswith("robustbench.")]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, "robustbench", None)
    message = r"preprocessing must be one of .*got None: .*'Salman2020Do_R18', but robustbench cann"
    with pytest.raises(ValueError, match=message):
        robustbench_evaluate(
            pooled, 3, "imagenet", eps=EPS, data_dir=tmp_path, model_name="Salman2020Do_R18"
        )
