"""``hf:FOLDER``: logits are those of transformers' own pipeline on the same files."""

import json
import pickle

import pytest
import torch
from jpegs import write_jpegs
from PIL import Image

from ironmoe.attacks.data.decoding import read_image
from ironmoe.attacks.data.preprocessing import Preprocessing
from ironmoe.attacks.evaluation.checksum import model_digest
from ironmoe.bench.models.load import load_model
from ironmoe.moe import CheckpointError, save_upcycled, upcycle

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SQUARE = {"height": 32, "width": 32}
SMALLER = {"height": 27, "width": 25}
EDGE = {"shortest_edge": 32}

# an image processor of transformers, the settings of a model, and whether rules say the same
CASES = {
    "ViT": ("ViT", {"size": SQUARE}, True),
    "ViT, not square": ("ViT", {"size": {"height": 33, "width": 21}, "resample": 3}, True),
    "ViT, no values": ("ViT", {"size": SQUARE, "do_normalize": False}, True),
    "ViT, as it is": ("ViT", {"size": SQUARE, "do_normalize": False, "do_rescale": False}, True),
    "ViT, no resize": ("ViT", {"do_resize": False}, True),
    "DeiT": ("DeiT", {"size": SQUARE, "crop_size": SMALLER}, True),
    "DeiT, crop only": ("DeiT", {"do_resize": False, "crop_size": SMALLER}, True),
    "BEiT": ("Beit", {"size": SQUARE, "crop_size": SMALLER, "do_center_crop": True}, True),
    "CLIP": ("CLIP", {"size": EDGE, "crop_size": SMALLER}, True),
    "CLIP, larger crop": ("CLIP", {"size": {"shortest_edge": 24}, "crop_size": SQUARE}, True),
    "BiT, DINOv2": ("Bit", {"size": {"shortest_edge": 37}, "crop_size": SMALLER}, True),
    "SigLIP": ("Siglip", {"size": SQUARE}, True),
    "ConvNeXt, small": ("ConvNext", {"size": EDGE, "crop_pct": 0.9}, True),
    "ConvNeXt, large": ("ConvNext", {"size": {"shortest_edge": 384}}, True),
    "LeViT": ("Levit", {"size": EDGE, "crop_size": {"height": 32, "width": 32}}, True),
    "EfficientNet": (
        "EfficientNet",
        {"size": SQUARE, "rescale_offset": True, "rescale_factor": 1 / 127.5, "resample": 0},
        True,
    ),
    "EfficientNet, no top": ("EfficientNet", {"size": SQUARE, "include_top": False}, True),
    "MobileNetV1": ("MobileNetV1", {"size": EDGE, "crop_size": SMALLER}, True),
    "MobileNetV2": ("MobileNetV2", {"size": EDGE, "crop_size": SMALLER}, True),
    "MobileViT, BGR": ("MobileViT", {"size": EDGE, "crop_size": SQUARE}, True),
    "PoolFormer": ("PoolFormer", {"size": EDGE, "crop_size": SQUARE, "crop_pct": 0.9}, True),
    "PVT": ("Pvt", {"size": SQUARE, "image_mean": [0.1, 0.2, 0.3]}, True),
    "Segformer": ("Segformer", {"size": SQUARE, "image_std": [0.1, 0.2, 0.3]}, True),
    "Perceiver": ("Perceiver", {"size": SQUARE, "crop_size": {"height": 36, "width": 36}}, False),
    "TextNet": ("TextNet", {"size": {"shortest_edge": 40}, "size_divisor": 32}, False),
    "Donut": ("Donut", {"size": SQUARE, "do_align_long_axis": True}, False),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_jpegs(tmp_path_factory.mktemp("jpegs"))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A folder with a network that takes images of any size."""
    folder = tmp_path_factory.mktemp("network")
    tiny(3).save_pretrained(folder)
    return folder


def tiny(channels):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=channels,
        embedding_size=8,
        hidden_sizes=[8],
        depths=[1],
        layer_type="basic",
        num_labels=5,
    )
    return transformers.ResNetForImageClassification(config).eval()


def processor_of(family, settings):
    return getattr(transformers, f"{family}ImageProcessor")(**settings)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_pipeline(name, files, network):
    family, settings, has_rules = CASES[name]
    processor = processor_of(family, settings)
    processor.save_pretrained(network)
    loaded = load_model(None, f"hf:{network}", CPU)
    model = transformers.AutoModelForImageClassification.from_pretrained(network).eval()
    pipeline = pickle.loads(pickle.dumps(loaded.pipeline))  # workers get it so
    if type(processor).__name__.endswith("Pil"):
        assert isinstance(pipeline, Preprocessing) == has_rules, str(pipeline)

    for file in files:
        picture = Image.open(file).convert("RGB")
        inputs = processor(picture, return_tensors="pt")["pixel_values"]
        pixels = pipeline(read_image(file, pipeline.channels))
        assert pixels.dtype == torch.uint8
        assert pixels.shape == inputs.shape[1:]
        assert pipeline.size in (None, tuple(pixels.shape[1:]))
        with torch.no_grad():
            ours = loaded.model(pixels[None].float() / 255)
            theirs = model(inputs.float()).logits
        scale = float(theirs.abs().max())  # float32 rounds inputs and sums of some 100 terms
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1, scale))


def test_pixels_of_rules_are_exactly_the_processors(files, network):
    processor = processor_of("CLIP", {"size": {"shortest_edge": 36}, "crop_size": SMALLER})
    processor.save_pretrained(network)
    pipeline = load_model(None, f"hf:{network}", CPU).pipeline
    for file in files:
        picture = Image.open(file).convert("RGB")
        theirs = processor(picture, return_tensors="pt", do_rescale=False, do_normalize=False)
        assert torch.equal(pipeline(picture), theirs["pixel_values"][0].to(torch.uint8))


def test_what_is_known_of_a_processor_is_told(network):
    processor = processor_of("ConvNext", {"size": EDGE})
    if not type(processor).__name__.endswith("Pil"):
        pytest.skip("torchvision resizes tensors here, for which there are no rules")
    processor.save_pretrained(network)
    told = load_model(None, f"hf:{network}", CPU).preprocessing
    assert told == (
        "shorter edge to 36 (bicubic), centre 32 × 32, mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5) "
        "(ConvNextImageProcessor)"
    )
    processor_of("TextNet", {}).save_pretrained(network)
    assert "itself, to the picture's size" in load_model(None, f"hf:{network}", CPU).preprocessing


def test_a_grey_model_gets_grey_pictures(files, tmp_path):
    model = tiny(1)
    model.save_pretrained(tmp_path)
    settings = {"size": SQUARE, "image_mean": [0.3], "image_std": [0.2], "do_convert_rgb": False}
    processor = processor_of("ViT", settings)
    processor.save_pretrained(tmp_path)
    loaded = load_model(None, f"hf:{tmp_path}", CPU)
    assert loaded.pipeline.channels == 1
    for file in files:
        inputs = processor(Image.open(file).convert("L"), return_tensors="pt")["pixel_values"]
        pixels = loaded.pipeline(read_image(file, 1))
        with torch.no_grad():
            torch.testing.assert_close(
                loaded.model(pixels[None] / 255), model(inputs).logits, rtol=1e-5, atol=1e-5
            )


def test_without_a_processor_it_is_said_what_is_assumed(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    loaded = load_model(None, f"hf:{tmp_path}", CPU)
    assert loaded.pipeline.size == (16, 16)
    assert "no preprocessor_config.json" in loaded.preprocessing
    assert loaded.model.mean is None

    processor_of("ViT", {"size": SQUARE}).save_pretrained(tmp_path)
    left_out = load_model(None, f"hf:{tmp_path}?processor=false", CPU)
    assert left_out.pipeline.size == (16, 16) and "processor=false" in left_out.preprocessing


@pytest.mark.parametrize("family", ["Siglip2", "ImageGPT", "Gemma3"])
def test_a_processor_that_makes_no_picture_is_refused_by_name(family, network):
    settings = {"clusters": [[0, 0, 0], [1, 1, 1]]} if family == "ImageGPT" else {}
    processor_of(family, settings).save_pretrained(network)
    with pytest.raises(CheckpointError, match=rf"its {family}\w* must give pixel_values"):
        load_model(None, f"hf:{network}", CPU)


def test_a_processor_whose_values_are_no_affine_function_is_refused(network, monkeypatch):
    from ironmoe.bench.models.kinds import hugging_face

    processor = processor_of("ViT", {"size": SQUARE})
    processor.save_pretrained(network)

    def squared(picture, **options):
        values = processor(picture, **options)["pixel_values"]
        is_whole = options.get("do_rescale") is False
        return {"pixel_values": values if is_whole else values.square()}

    class Odd:
        do_rescale = do_normalize = True
        __call__ = staticmethod(squared)

    monkeypatch.setattr(hugging_face, "_processor", lambda source: Odd())
    with pytest.raises(CheckpointError, match=r"its Odd must compute \(pixels − mean\) / std"):
        load_model(None, f"hf:{network}", CPU)


def test_weights_that_are_missing_are_named(tmp_path):
    backbone = transformers.ResNetModel(tiny(3).config)
    backbone.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"must hold all weights .* missing: classifier"):
        load_model(None, f"hf:{tmp_path}", CPU)


def test_a_file_that_is_no_json_is_named(network):
    (network / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="its image processor cannot be loaded"):
        load_model(None, f"hf:{network}", CPU)
    (network / "preprocessor_config.json").write_text(json.dumps({}))


def test_a_model_in_half_precision_gives_float32_and_gradients_to_the_pixels(tmp_path):
    model = tiny(3).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    processor_of("ViT", {"size": SQUARE}).save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)

    wide = load_model(None, f"hf:{tmp_path}?dtype=float32", CPU).model
    half = load_model(None, f"hf:{tmp_path}", CPU).model
    for loaded in (wide, half):
        logits = loaded(pixels)
        assert logits.dtype == torch.float32
        (gradient,) = torch.autograd.grad(logits.sum(), pixels)
        assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0
    # bfloat16 has 8 bits, and errors of a few layers add up
    torch.testing.assert_close(half(pixels), wide(pixels), rtol=0.1, atol=0.1)


def test_an_upcycled_file_fits_the_dense_model_of_the_folder(tmp_path):
    """As ``save_upcycled`` writes it of that very model, by ``--weights``."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor_of("ViT", {"size": SQUARE}).save_pretrained(tmp_path)
    upcycle(model, 4, 2, noise=0.5)
    save_upcycled(model, tmp_path / "up.safetensors")

    weights = tmp_path / "up.safetensors"
    loaded = load_model(None, f"hf:{tmp_path}", CPU, weights=weights)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(2 * pixels - 1).logits
        torch.testing.assert_close(loaded.model(pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", ["no", "0", "off", "none"])
def test_a_processor_is_left_out_by_false_and_by_nothing_else(text, network):
    with pytest.raises(CheckpointError, match=f"must have processor=true or .*, got '{text}'"):
        load_model(None, f"hf:{network}?processor={text}", CPU)


def test_classes_without_a_name_are_named(tmp_path):
    tiny(3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {number: f"class {number}" for number in (0, 1, 2, 3, 7)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"classes 0 to 4 by id2label .*, got none for 4"):
        load_model(None, f"hf:{tmp_path}", CPU)


@pytest.mark.parametrize("resample", ["bilinear", "BICUBIC", "lanczos", "unheard of", 3])
def test_a_resampling_may_be_a_name_as_far_as_transformers_takes_it(resample, files, tmp_path):
    """Which one a name means transformers decides: pixels are the processor's own."""
    tiny(3).save_pretrained(tmp_path)
    processor_of("ViT", {"size": SQUARE}).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"resample": resample}))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    picture = Image.open(files[0]).convert("RGB")
    try:
        wanted = processor(picture, return_tensors="pt", do_normalize=False, do_rescale=False)
    except Exception as error:
        pytest.skip(f"this transformers does not take it: {error}")
    loaded = load_model(None, f"hf:{tmp_path}", CPU)
    pixels = loaded.pipeline(read_image(files[0], 3))
    assert torch.equal(pixels, wanted["pixel_values"][0].to(torch.uint8))


def test_a_configuration_with_the_same_weights_is_another_model(tmp_path):
    """The number of heads is neither in the weights nor in what a module prints."""
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=8, patch_size=4,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    seen = []
    for heads in (2, 4):
        model.config.num_attention_heads = heads
        model.save_pretrained(tmp_path)
        loaded = load_model(None, f"hf:{tmp_path}", CPU)
        seen.append((loaded.identity, model_digest(loaded.model)))
    (name, digest), (other_name, other_digest) = seen
    assert name != other_name and digest == other_digest


def test_a_folder_that_is_none_is_told_from_one_without_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, reason in {
        "none": "no such folder: .*none",
        "file": "is a file and no folder",
        "empty": "holds no config.json",
    }.items():
        with pytest.raises(CheckpointError, match=f"{reason}. Nothing is downloaded"):
            load_model(None, f"hf:{tmp_path / name}", CPU)
