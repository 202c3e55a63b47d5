"""Libraries that would rather download weights: inside a block they cannot, and say which file they
lack."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from ironmoe.moe.checkpoints.errors import CheckpointError

# functions that fetch a file, by the module whose name they are called by, with the position of
# where they put it
DOWNLOADS = {
    ("torch.hub", "download_url_to_file"): 1,
    ("timm.models._hub", "download_url_to_file"): 1,
    ("robustbench.utils", "download_gdrive"): 1,
    ("robustbench.utils", "download_gdrive_new"): 1,
}
HUB = "huggingface_hub.constants"


@contextmanager
def nothing_downloaded(wanted_by: object) -> Iterator[None]:
    """Inside the block, a download raises CheckpointError, which names the file.

    It covers torch.hub, by which torchvision and timm fetch weights, the Hugging Face hub, and
    RobustBench's own function, of those that are imported when the block begins.
    """
    with ExitStack() as stack:
        importlib.import_module("torch.hub")
        for (module, name), place in DOWNLOADS.items():
            if hasattr(sys.modules.get(module), name):
                refuse = _refusal(wanted_by, place)
                stack.enter_context(mock.patch.object(sys.modules[module], name, refuse))
        if HUB in sys.modules:
            stack.enter_context(mock.patch.object(sys.modules[HUB], "HF_HUB_OFFLINE", True))
        yield


def _refusal(wanted_by: object, place: int) -> Any:
    def refuse(*arguments: Any, **named: Any) -> NoReturn:
        values = [*arguments, *named.values()]
        target = values[place] if len(values) > place else None
        raise CheckpointError(
            f"{wanted_by} needs the file {Path(str(target)).absolute()}, which does not exist, and "
            f"nothing is downloaded; get it from {values[0] if values else 'its source'}"
        )

    return refuse
