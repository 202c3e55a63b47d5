"""What ``--data`` and ``--labels`` say."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ironmoe.attacks.data import DataError, ImageArrays, LoaderStream, TorchImages
from ironmoe.bench.data.devkit import validation_images
from ironmoe.bench.data.loader_images import LoaderImages
from ironmoe.bench.data.sets import open_data, open_set
from ironmoe.bench.data.split import sample, stratified

FUNCTIONS = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def images(count=4, side=8):
    return TensorDataset(torch.rand(count, 3, side, side), torch.arange(count) % 3)

def loader(**options):
    return DataLoader(images(**options), batch_size=3)

here = images()

def arrays():
    return torch.rand(6, 3, 4, 4).numpy(), (torch.arange(6) % 3).numpy()

def batches():
    pixels, labels = images()[:]
    return [(pixels[:3], labels[:3]), (pixels[3:], labels[3:])]

def raises():
    raise KeyError("no file")

def nothing():
    return 7
"""


@pytest.fixture
def flat(tmp_path):
    """Four images in one folder."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (9, 8), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


def test_a_flat_folder_finds_its_table_or_is_given_one(flat, tmp_path):
    table = tmp_path / "elsewhere.csv"
    table.write_text("".join(f"{number}.png,{3 - number}\n" for number in range(4)))
    assert open_set(str(flat), table).labels.tolist() == [3, 2, 1, 0]
    (flat / "labels.json").write_text(json.dumps({f"{n}.png": "ab"[n % 2] for n in range(4)}))
    assert open_set(str(flat)).names == ["a", "b"]
    assert len(open_set(str(flat / "labels.json"))) == 4
    with pytest.raises(DataError, match="must come with a folder in --data, got 'digits'"):
        open_set("digits", table)


def test_a_function_of_ones_own_gives_a_set_or_a_loader(tmp_path, monkeypatch):
    (tmp_path / "own_data_18.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    found = open_data("own_data_18:images?count=5&side=4")
    assert isinstance(found, TorchImages) and len(found) == 5
    assert found.read(0, 3).image.shape == (3, 4, 4)
    assert isinstance(open_data("own_data_18:here"), TorchImages)
    loader = open_data("own_data_18:loader?count=7")
    assert isinstance(loader, LoaderStream) and loader.length == 7
    with pytest.raises(DataError, match=r"a set with images by number .* got LoaderStream"):
        open_set("own_data_18:loader")
    assert open_set("own_data_18:arrays").labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert [len(labels) for _, labels in open_data("own_data_18:batches")] == [3, 1]

    for name, message in {
        "raises": "calling it failed: KeyError: 'no file'",
        "nothing": "got int",
        "absent": "cannot be imported: AttributeError",
        "here?count=3": "no function and takes no arguments",
        "images?size=3": "takes {'size': 3}, and calling it failed: TypeError",
    }.items():
        with pytest.raises(DataError, match=message):
            open_data(f"own_data_18:{name}")
    with pytest.raises(DataError, match="cannot be imported: ModuleNotFoundError"):
        open_data("no_such_module_18:images")


def test_tables_of_hugging_face_are_found_with_their_parts(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"image": [b"x", b"y"], "fine": [0, 1], "coarse": [1, 1]})
    for split in ("test", "train"):
        (tmp_path / "two" / split).mkdir(parents=True)
        parquet.write_table(table, tmp_path / "two" / split / "0.parquet")
    assert open_set(f"{tmp_path / 'two'}?split=test&label=fine").labels.tolist() == [0, 1]
    for split in ("test", "train"):
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    for query, hint in (("", "split=NAME"), ("?split=test", "split=test&label=NAME")):
        with pytest.raises(DataError) as caught:
            open_set(f"{tmp_path}{query}")
        assert str(caught.value).endswith(f"; --data '{tmp_path}?{hint}' says which")
    one = tmp_path / "two" / "test" / "0.parquet"
    assert open_set(f"{one}?label=coarse").labels.tolist() == [1, 1]
    one.rename(one.with_name("CAPITALS.PARQUET"))
    one = one.with_name("CAPITALS.PARQUET")
    for spec in (f"{one}?label=coarse", f"{one.parent}?label=coarse"):
        assert open_set(spec).labels.tolist() == [1, 1]
    with pytest.raises(DataError, match="may set split, image, label, got 'lable'"):
        open_set(f"{one}?lable=fine")


def test_a_query_belongs_to_tables_alone(flat):
    (flat / "labels.csv").write_text("0.png,1\n")
    with pytest.raises(DataError, match="must name a parquet or saved data set to take a query"):
        open_set(f"{flat}?split=test")


def test_what_is_missing_of_imagenet_is_named(tmp_path):
    flat = tmp_path / "val"
    flat.mkdir()
    (flat / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match="look like ImageNet's validation images: --labels robust"):
        open_set(str(flat))
    kit = tmp_path / "ILSVRC2012_devkit_t12"
    with pytest.raises(DataError, match=r"kit, got .*devkit_t12, which does not exist"):
        open_set(str(flat), kit)
    kit.mkdir()
    with pytest.raises(DataError, match=r"got the folder .*devkit_t12 without data.meta\.mat"):
        open_set(str(flat), kit)
    kit.with_suffix(".tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"devkit_t12\.tar\.gz, an archive: unpack it"):
        open_set(str(flat), kit.with_suffix(".tar.gz"))


@pytest.fixture
def devkit(tmp_path):
    """A development kit of four classes, one of which has classes below it, in its own order."""
    io = pytest.importorskip("scipy.io")
    kind = [
        ("ILSVRC2012_ID", object),
        ("WNID", object),
        ("words", object),
        ("num_children", object),
    ]
    rows = [(1, "n3", "c", 0), (2, "n1", "a", 0), (3, "n2", "b", 0), (4, "n9", "z", 2)]
    kit = tmp_path / "kit"
    (kit / "data").mkdir(parents=True)
    io.savemat(kit / "data" / "meta.mat", {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    (kit / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n1\n2\n3\n")
    return kit


def test_the_development_kit_names_the_labels_in_its_own_order(tmp_path, devkit):
    folder = tmp_path / "val"
    folder.mkdir()
    for number in range(1, 5):
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").touch()
    found = open_set(str(folder), devkit)
    assert found.names == ["n1", "n2", "n3"] and found.labels.tolist() == [2, 2, 0, 1]
    (folder / "ILSVRC2012_val_00000003.JPEG").unlink()
    (folder / "ILSVRC2012_val_00000003.JPEG").symlink_to(folder / "nowhere")
    assert len(validation_images(folder, devkit)) == 4  # whoever reads it says that it is not there
    (folder / "ILSVRC2012_val_00000003.JPEG").unlink()
    with pytest.raises(DataError, match=r"1 that are not there, the first .*00000003\.JPEG"):
        validation_images(folder, devkit)
    with pytest.raises(DataError, match="the folder of ImageNet's development kit, got the folder"):
        open_set(str(folder), tmp_path)
    (devkit / "data" / "meta.mat").write_bytes(b"no mat file")
    with pytest.raises(DataError, match=r"must be the meta\.mat of ILSVRC 2012"):
        open_set(str(folder), devkit)


def test_the_first_images_of_a_loader_in_its_order():
    images, labels = torch.rand(10, 3, 4, 4), torch.arange(10) % 3
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    for length in (None, 10):
        some = LoaderImages(LoaderStream(batches, length=length), most=7)
        some.num_logits = 3
        assert len(some) == 7
        assert torch.equal(torch.cat([part for part, _ in some]), images[:7])
        (one,) = some.read(torch.tensor([5, 0]))
        assert torch.equal(one.images, images[[5, 0]]) and one.labels.tolist() == [2, 0]

    unknown = LoaderImages(LoaderStream(batches), most=50)
    assert len(unknown) == 50 and sum(len(part) for part, _ in unknown) == 10 == len(unknown)
    some.num_logits = 2
    with pytest.raises(DataError, match=r"logits, 0 … 1, got 0 … 2 among images 0 … 3"):
        list(some)
    some.logits = torch.tensor([7, 5, 6])
    assert torch.cat([part for _, part in some]).tolist() == [7, 5, 6, 7, 5, 6, 7]
    some.logits = torch.tensor([7, 5])
    with pytest.raises(DataError, match=r"the 2 classes that have a logit, 0 … 1, got 0 … 2"):
        list(some)


def test_a_sample_is_of_all_images_and_the_same_every_time():
    assert sample(5, 5).tolist() == [0, 1, 2, 3, 4]
    drawn = sample(1000, 100)
    assert torch.equal(drawn, sample(1000, 100)) and len(drawn.unique()) == 100
    assert drawn.tolist() == sorted(drawn.tolist())
    assert 300 < drawn.double().mean() < 700  # not the first ones: far beyond five deviations


def test_the_test_split_has_a_fifth_of_each_class():
    labels = torch.tensor([0] * 10 + [2] * 5)
    train, test = stratified(labels, ["a", "none", "b"])
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(15))
    assert torch.bincount(labels[test]).tolist() == [2, 0, 1]


def test_arrays_on_the_disk_are_not_loaded(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((4, 6, 6), np.uint8), labels=np.arange(4) % 2)
    found = open_set(str((tmp_path / "set.npz").rename(tmp_path / "set.NPZ")))
    assert isinstance(found, ImageArrays) and isinstance(found.images.base, np.memmap)
