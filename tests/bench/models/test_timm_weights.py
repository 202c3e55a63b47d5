"""``timm:NAME?checkpoint=FILE``: for which size, and files that timm has to convert."""

import re

import pytest
import staged_twins
import torch
from libraries import stand_in
from timm_stand_in import MEAN, STD, OfOneSize, Tiny, timm_with
from torch import nn

from ironmoe.attacks.data import DataError
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.models.class_matching import match
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.load import load_model
from ironmoe.bench.models.overrides import Overrides
from ironmoe.moe import CheckpointError, save_upcycled, upcycle

CPU = torch.device("cpu")
FIXED = {"input_size": (3, 16, 16), "crop_pct": 0.5, "fixed_input_size": True}


@pytest.fixture
def vit_file(monkeypatch, tmp_path):
    """Weights of a model for images of 16 × 16, and that model."""
    timm_with(monkeypatch, vit=FIXED, resnet={})
    model = OfOneSize(3, 5, FIXED, 16)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth", model


def test_a_model_with_weights_keeps_the_size_of_the_weights(vit_file, tmp_path):
    """Whatever the data: their pictures are resized to it."""
    file, model = vit_file
    spec = f"timm:vit?checkpoint={file}"
    for size in (None, (24, 24)):
        loaded = load_model(None, spec, CPU, image_size=size)
        assert loaded.image_shape == (3, 16, 16)
        assert str(loaded.pipeline).startswith("shorter edge to 32 (bicubic), centre 16 × 16")
        assert torch.equal(loaded.model.model.pos_embed, model.pos_embed)

    torch.save(Tiny(3, 5, {}).state_dict(), tmp_path / "resnet.pth")
    any_size = f"timm:resnet?checkpoint={tmp_path / 'resnet.pth'}"
    assert load_model(None, any_size, CPU, image_size=(24, 24)).pipeline.size == (24, 24)
    free = load_model(None, f"{spec}&dynamic_img_size=true", CPU, image_size=(24, 24))
    assert free.pipeline.size == (24, 24) and free.image_shape is None


def test_a_crop_of_another_size_than_the_weights_names_the_way(vit_file):
    message = (
        "--crop must end at the 16 × 16 pixels that vit takes, got 24 × 24; img_size=24 after the "
        "question mark of --model builds it for that size"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        load_model(
            None,
            f"timm:vit?checkpoint={vit_file[0]}",
            CPU,
            image_size=(24, 24),
            overrides=Overrides.parse(crop="24"),
        )


def test_images_of_another_size_than_the_weights_name_the_way(vit_file):
    """Such as those of a loader, which come as they are."""
    loaded = load_model(None, f"timm:vit?checkpoint={vit_file[0]}", CPU)
    with pytest.raises(DataError, match=r"of shape \(3, 16, 16\) for vit, .* img_size=24x32 after"):
        match(loaded, torch.rand(1, 3, 24, 32), None, None, data="photos")
    with pytest.raises(DataError) as caught:  # its channels are wrong
        match(loaded, torch.rand(1, 1, 16, 16), None, None, data="photos")
    assert "img_size" not in str(caught.value)


@pytest.mark.parametrize(("asked", "size"), [("32", (32, 32)), ("32x48", (32, 48))])
def test_weights_are_resampled_where_the_name_asks_for_a_size(asked, size, vit_file):
    file, model = vit_file
    loaded = load_model(None, f"timm:vit?img_size={asked}&checkpoint={file}", CPU)
    assert loaded.image_shape == (3, *size) and loaded.pipeline.size == size
    expected = nn.functional.interpolate(model.pos_embed.view(1, 1, 16, 16), size)
    assert torch.equal(loaded.model.model.pos_embed, expected.flatten(1))


def test_weights_of_another_size_are_not_resampled_unasked(vit_file, tmp_path):
    torch.save(OfOneSize(3, 5, FIXED, 24).state_dict(), tmp_path / "larger.pth")
    message = (
        "of another shape: pos_embed (1, 576) where the model has (1, 256). These weights are for "
        "another size: img_size=SIZE after the question mark builds the model for it, or lets timm "
        "resample pos_embed"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(None, f"timm:vit?checkpoint={tmp_path / 'larger.pth'}", CPU)


@pytest.mark.parametrize("name", ["tiny", "vit"])
def test_a_file_of_the_authors_goes_through_timms_filter(name, monkeypatch, tmp_path):
    timm_with(monkeypatch, tiny={}, vit=FIXED)
    model = Tiny(3, 7, {}) if name == "tiny" else OfOneSize(3, 7, FIXED, 16)
    theirs = {k.replace("head.", "fc."): v for k, v in model.state_dict().items()}
    torch.save({"model": theirs | {"attn_mask": torch.zeros(9)}}, tmp_path / "theirs.pth")
    spec = f"timm:{name}?checkpoint={tmp_path / 'theirs.pth'}"
    loaded = load_model(None, f"{spec}&num_classes=7", CPU).model.model
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)

    # a head for other classes is an error, and no random head
    with pytest.raises(CheckpointError, match=r"head.bias \(7,\) where the model has \(6,\)"):
        load_model(None, f"{spec}&num_classes=6", CPU)


def test_an_upcycled_file_fits_the_model_that_it_was_made_of(monkeypatch, tmp_path):
    def create_model(name, pretrained=False):
        torch.manual_seed(0)
        return staged_twins.TimmConvNeXt()

    stand_in(monkeypatch, "timm", create_model=create_model, __version__="1.0")
    model = create_model("twin")
    upcycle(model, 4, 2, noise=0.5)
    save_upcycled(model, tmp_path / "up.safetensors")
    pixels = torch.rand(2, 3, 16, 16)
    own = load_model(None, f"timm:twin?checkpoint={tmp_path / 'up.safetensors'}", CPU)
    after = load_model(None, "timm:twin", CPU, weights=tmp_path / "up.safetensors")
    with torch.no_grad():
        expected = Classifier(model.eval(), MEAN, STD)(pixels)
        for loaded in (own, after):
            assert torch.equal(loaded.model(pixels), expected)
