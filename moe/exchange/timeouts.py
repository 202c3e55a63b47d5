"""How long an exchange waits for a rank that does not come."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist


def timeout_of_all() -> timedelta | None:
    """The timeout that ``init_process_group`` was given; None where its backend does not tell."""
    return timeout_of(dist.group.WORLD)


def wait_as_long_as_all(process_group: Any) -> None:
    """Give a process group for which nobody has chosen a timeout that of ``init_process_group``.
    torch gives the groups of a ``DeviceMesh`` its default, which is half an hour for gloo."""
    c10d: Any = dist.distributed_c10d
    told, own = timeout_of_all(), timeout_of(process_group)
    was_chosen = own not in (c10d.default_pg_timeout, c10d.default_pg_nccl_timeout)
    if told not in (None, own) and not was_chosen and hasattr(c10d, "_set_pg_timeout"):
        c10d._set_pg_timeout(told, process_group)


def timeout_of(process_group: Any) -> timedelta | None:
    """That of a process group; None where its backend does not tell. All backends of a group are
    given the same."""
    device = process_group._device_types[0]
    options = getattr(process_group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)
