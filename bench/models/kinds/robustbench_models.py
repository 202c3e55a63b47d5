"""``robustbench:NAME?dataset=imagenet``: a model of RobustBench's zoo, from files on disk."""

import difflib
from pathlib import Path
from typing import Any

from ironmoe.bench.common.errors import told
from ironmoe.bench.common.query import read_known
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.kinds.torchvision_rules import rules_of
from ironmoe.bench.models.loaded import LoadedModel, facts_of
from ironmoe.bench.models.offline import nothing_downloaded
from ironmoe.bench.models.packages import imported
from ironmoe.bench.models.registry import Source, register_kind
from ironmoe.moe.checkpoints.errors import CheckpointError

KNOWN = {"dataset": str, "threat_model": str, "model_dir": str}
USUAL = {"dataset": "cifar10", "threat_model": "Linf", "model_dir": "models"}  # RobustBench's own


@register_kind("robustbench", form="robustbench:NAME?dataset=imagenet")
def load_robustbench(source: Source) -> LoadedModel:
    """``robustbench.load_model(NAME, …)``, and the preprocessing that its benchmark uses. The
    model takes pixels in [0, 1] and normalizes them itself.

    Raises:
        CheckpointError: robustbench cannot be imported, has no such model, or lacks its files.
    """
    asked = USUAL | read_known(source.spec, source.query, KNOWN)
    utils = imported("robustbench.utils", source)
    data = imported("robustbench.data", source)
    zoo = imported("robustbench.model_zoo", source)
    enums = imported("robustbench.model_zoo.enums", source)
    try:
        dataset = enums.BenchmarkDataset(asked["dataset"])
        threat = enums.ThreatModel(asked["threat_model"])
        models = zoo.model_dicts[dataset][threat]
    except (ValueError, KeyError) as error:
        names = ", ".join(each.value for each in enums.BenchmarkDataset)
        threats = ", ".join(each.value for each in enums.ThreatModel)
        raise CheckpointError(
            f"{source} must be of dataset {names} and of threat_model {threats}, got "
            f"{asked['dataset']} and {asked['threat_model']}"
        ) from error
    if source.path not in models:
        near = difflib.get_close_matches(source.path, list(models), n=3)
        raise CheckpointError(
            f"{source} must name a model of RobustBench for {dataset.value} and {threat.value}, "
            f"got {source.path!r}" + (f"; close: {', '.join(near)}" if near else "")
        )

    folder = Path(asked["model_dir"]) / dataset.value / threat.value
    _check_files(source, models[source.path], folder)
    try:
        with nothing_downloaded(source):
            model = utils.load_model(
                source.path,
                model_dir=asked["model_dir"],
                dataset=asked["dataset"],
                threat_model=asked["threat_model"],
            )
            transforms = data.get_preprocessing(dataset, threat, source.path, None).transforms
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{source} cannot be loaded: {told(error)}") from error

    return LoadedModel(
        Classifier(model),
        source.path,
        None,
        None,
        facts_of(source.path, dataset=dataset.value, threat_model=threat.value),
        pipeline=rules_of(transforms, source, "RobustBench's own"),
    )


def _check_files(source: Source, entry: dict[str, Any], folder: Path) -> None:
    """CheckpointError unless the files that RobustBench would download are there. What timm or
    torchvision would fetch is asked for when they load."""
    where = entry.get("gdrive_id")
    if not where:
        return
    names = [f"_m{i}" for i in range(len(where))] if isinstance(where, list) else [""]
    missing = [file for end in names if not (file := folder / f"{source.path}{end}.pt").is_file()]
    if missing:
        links = [f"https://drive.google.com/uc?id={each}" for each in _listed(where)]
        raise CheckpointError(
            f"{source} needs the file {missing[0].absolute()}, which does not exist, and nothing "
            f"is downloaded; get it from {links[0]}, or name its zoo's folder by model_dir=FOLDER"
            + (f" (all of it: {', '.join(links)})" if len(links) > 1 else "")
        )


def _listed(where: Any) -> list[str]:
    return [str(each) for each in where] if isinstance(where, list) else [str(where)]
