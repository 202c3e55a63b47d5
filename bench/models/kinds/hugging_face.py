"""``hf:FOLDER``: an image classifier that transformers saved, with its image processor."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ironmoe.attacks.data.preprocessing import Preprocessing
from ironmoe.bench.common.errors import told
from ironmoe.bench.common.query import read_known
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.kinds.image_processor import take
from ironmoe.bench.models.loaded import LoadedModel, facts_of
from ironmoe.bench.models.packages import imported, why_not
from ironmoe.bench.models.registry import Source, register_kind
from ironmoe.moe import huggingface, recipe_of
from ironmoe.moe.checkpoints.errors import CheckpointError

PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@register_kind("hf", form="hf:FOLDER", is_path=True)
def load_hugging_face(source: Source) -> LoadedModel:
    """The classifier in a folder of ``save_pretrained``. Pixels and normalization are those of its
    image processor; ``processor=false`` leaves that out.

    Raises:
        CheckpointError: transformers is missing, the folder holds no image classifier with all of
            its weights, or its processor cannot be taken apart.
    """
    read_known(source.spec, source.query, {"processor": str})
    is_left_out = source.switch("processor") is False
    model = _model(source)
    config: Any = model.config
    channels = getattr(config, "num_channels", 3)
    classes = _classes(source, config)
    name, facts = type(model).__name__, facts_of(Path(source.path).name)

    has_processor = any((Path(source.path) / file).is_file() for file in PROCESSORS)
    if not has_processor or is_left_out:
        pipeline = _assumed(model, channels, has_processor)
        return LoadedModel(Classifier(model), name, None, classes, facts, pipeline=pipeline)

    taken = take(_processor(source), channels, f"{source}")
    return LoadedModel(
        Classifier(model, taken.mean, taken.std, taken.order),
        name,
        None,
        classes,
        facts | {"mean": taken.mean, "std": taken.std},
        pipeline=taken.pipeline,
    )


def _model(source: Source) -> nn.Module:
    transformers = imported("transformers", source)
    _check_folder(source)
    try:
        if recipe_of(source.path) is not None:
            huggingface.register()  # so that the model is upcycled as its recipe says
        with _without_bars(transformers):
            model, report = transformers.AutoModelForImageClassification.from_pretrained(
                source.path, local_files_only=True, output_loading_info=True
            )
    except Exception as error:
        raise CheckpointError(
            f"{source} is no image classifier that transformers can read here: {_reason(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source} must hold all weights of {type(model).__name__}, which would else be "
            f"random; missing: {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        )
    return model


@contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    """Inside the block transformers shows no bar for each weight that it loads."""
    logging = transformers.utils.logging
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


def _check_folder(source: Source) -> None:
    """CheckpointError: there is no folder, or save_pretrained did not write it."""
    folder = Path(source.path)
    if folder.is_dir() and (folder / "config.json").exists():
        return
    what = f"no such folder: {source.path}"
    if folder.is_dir():
        what = f"the folder {source.path} holds no config.json"
    elif folder.exists():
        what = f"{source.path} is a file and no folder"
    raise CheckpointError(
        f"{source} must name a folder of save_pretrained; {what}. Nothing is downloaded: a model "
        f"of the Hub comes into a folder by: hf download NAME --local-dir FOLDER"
    )


def _classes(source: Source, config: Any) -> list[str]:
    """Their names, by index of the logits.

    Raises:
        CheckpointError: there is none for some of them.
    """
    names, count = config.id2label, config.num_labels
    missing = [str(number) for number in range(count) if number not in names]
    if missing:
        raise CheckpointError(
            f"{source} must name classes 0 to {count - 1} by id2label in config.json, got none "
            f"for {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        )
    return [str(names[number]) for number in range(count)]


def _processor(source: Source) -> Any:
    transformers = imported("transformers", source)
    try:
        return transformers.AutoImageProcessor.from_pretrained(source.path, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{source}: its image processor cannot be loaded: {_reason(error)}; processor=false "
            "leaves it out"
        ) from error


def _reason(error: Exception) -> str:
    """Why transformers failed: it imports most of itself late, torchvision among it."""
    is_broken = "torchvision::" in str(error) or "torchvision/_C" in str(error)
    return why_not(error, "transformers") if is_broken else told(error)


def _assumed(model: nn.Module, channels: int, has_processor: bool) -> Preprocessing | None:
    """The model's size, if it has one, and pixels in [0, 1] as they are."""
    size = getattr(model.config, "image_size", None)
    size = (size, size) if isinstance(size, int) else size
    if not isinstance(size, list | tuple) or len(size) != 2:
        return None
    why = "processor=false" if has_processor else f"the folder has no {PROCESSORS[0]}"
    return Preprocessing(
        channels=channels,
        resize=(int(size[0]), int(size[1])),
        mode="exact",
        source=f"assumed, because of {why}" if has_processor else f"assumed, because {why}",
    )
