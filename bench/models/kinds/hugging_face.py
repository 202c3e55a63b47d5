"""``hf:FOLDER``: an image classifier that transformers saved."""

import json
from pathlib import Path

from ironmoe.bench.common.errors import told
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.loaded import LoadedModel, facts_of
from ironmoe.bench.models.query import read_known
from ironmoe.bench.models.registry import Source, register_kind
from ironmoe.moe.checkpoints.errors import CheckpointError


@register_kind("hf", form="hf:FOLDER", is_path=True)
def load_hugging_face(source: Source) -> LoadedModel:
    """The classifier in a folder of ``save_pretrained``, with what its image processor does.

    Raises:
        CheckpointError: transformers is missing, or the folder holds no image classifier.
    """
    read_known(source.spec, source.query, {})
    path = source.path
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise CheckpointError(
            f"--model hf:{path} needs the transformers package: {error}"
        ) from error

    try:
        model = AutoModelForImageClassification.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"--model hf:{path} is no image classifier that transformers can read here: "
            f"{told(error)}"
        ) from error

    config = Path(path) / "preprocessor_config.json"
    try:
        settings = json.loads(config.read_text()) if config.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{config} must be JSON: {error}") from error

    channels = getattr(model.config, "num_channels", 3)
    normalizes = settings.get("do_normalize", "image_mean" in settings)
    mean, std = (
        settings[key] if normalizes and key in settings else [default] * channels
        for key, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    classes = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    facts = facts_of(Path(path).name, mean=mean, std=std)
    return LoadedModel(Classifier(model, mean, std), type(model).__name__, None, classes, facts)
