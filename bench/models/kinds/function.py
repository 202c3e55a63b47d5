"""``package.module:function?key=value``: a model that a Python function returns."""

import importlib
import sys
from pathlib import Path

from torch import nn

from ironmoe.attacks.data.preprocessing import Preprocessing
from ironmoe.bench.common.errors import told
from ironmoe.bench.common.query import read_value
from ironmoe.bench.models.classifier import as_it_is
from ironmoe.bench.models.loaded import LoadedModel, facts_of
from ironmoe.bench.models.registry import Source
from ironmoe.moe.checkpoints.errors import CheckpointError

FORM = "package.module:function"
TRAINED_ON = "trained_on_data"


def load_function(source: Source) -> LoadedModel:
    """The module that ``source.path``, "package.module:function", is or returns. What the query
    sets are the function's keyword arguments. A module may say how it wants its pictures, by an
    attribute ``preprocessing``, a ``Preprocessing`` without mean and std. Its ``trained_on_data``
    names the built-in set of which it has seen the training part alone.

    Raises:
        CheckpointError: it cannot be imported, raises, or returns something else.
    """
    module, _, name = source.path.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{source} cannot be found: {error}; it must be {FORM}") from error
    except Exception as error:
        raise CheckpointError(f"{source} cannot be imported: {told(error)}") from error
    finally:
        sys.path.pop(0)

    arguments = {key: read_value(text) for key, text in source.query.items()}
    if isinstance(made, nn.Module) and arguments:
        raise CheckpointError(f"{source} is a module and takes no arguments, got {arguments}")
    try:
        model = made if isinstance(made, nn.Module) else made(**arguments)
    except Exception as error:
        taking = f"that takes the arguments {arguments}" if arguments else "without arguments"
        raise CheckpointError(
            f"{source} must be a torch.nn.Module, which takes the images, or a function {taking} "
            f"that returns one, and calling it failed: {told(error)}"
        ) from error

    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"{source} must be, or return, a torch.nn.Module from images in [0, 1] to logits, got "
            f"{type(model).__name__}"
        )
    facts = facts_of(source.path.replace(":", "-"))
    if (data := getattr(model, TRAINED_ON, None)) is not None:
        facts[TRAINED_ON] = str(data)
    rules = _rules(model, source)
    return LoadedModel(as_it_is(model), name, None, None, facts, pipeline=rules)


def _rules(model: nn.Module, source: Source) -> Preprocessing | None:
    """What the module says of its pictures. Attributes of that name of another kind mean something
    else."""
    rules = getattr(model, "preprocessing", None)
    if not isinstance(rules, Preprocessing):
        return None
    if rules.mean or rules.std:
        raise CheckpointError(
            f"{source} must have a preprocessing without mean and std, which the model computes "
            f"itself or --mean and --std give it, got {rules}"
        )
    return rules if rules.source else rules.with_(source=f"preprocessing of {source.path}")
