"""What joins GPUs: bytes a second and latencies inside a node and between nodes, and the memory of
each GPU."""

from typing import NamedTuple

from ironmoe.bench.benchmarks.gpus import GPUS, Gpu
from ironmoe.bench.common.choices import did_you_mean, named
from ironmoe.bench.common.user_error import UserError

START_US = 8.4  # NCCL's own estimate: src/graph/tuning.cc, baseLat of rings, protocol Simple
NVLINK_US = 3.4  # there, hwLat: one step over NVLink
NETWORK_US = 9.6  # there, hwLat: one step over the network


class Links(NamedTuple):
    """nvlink: 10⁹ bytes a second that a GPU sends to others of its node; network: to other nodes;
    memory: 10⁹ bytes; source: of these three. nvlink_us, network_us: microseconds of one step;
    start_us: those before the first step of an exchange."""

    nvlink: float
    network: float
    memory: float
    source: str
    nvlink_us: float = NVLINK_US
    network_us: float = NETWORK_US
    start_us: float = START_US


# Data sheets state NVLink in both directions together: a GPU sends at half of it. InfiniBand of
# 400 Gb/s is 50 GB/s in each direction.
LINKS = {
    "h100": Links(
        900 / 2,
        400 / 8,
        80,
        "NVIDIA H100, data sheet, H100 SXM: NVLink 900 GB/s, 80 GB. NVIDIA DGX H100, data sheet: 8 "
        "ConnectX-7 of 400 Gb/s for 8 GPUs",
    ),
    "h200": Links(
        900 / 2,
        400 / 8,
        141,
        "NVIDIA H200, data sheet, H200 SXM: NVLink 900 GB/s, 141 GB. NVIDIA DGX H200, data sheet: "
        "8 ConnectX-7 of 400 Gb/s for 8 GPUs",
    ),
    "b200": Links(
        1800 / 2,
        400 / 8,
        1440 / 8,
        "NVIDIA DGX B200, data sheet: 14.4 TB/s of NVLink and 1,440 GB for 8 GPUs, 8 ConnectX-7 of "
        "400 Gb/s",
    ),
    "a100": Links(
        600 / 2,
        200 / 8,
        80,
        "NVIDIA A100, data sheet, A100 80GB SXM: NVLink 600 GB/s, 80 GB. NVIDIA DGX A100, data "
        "sheet: 8 ports of 200 Gb/s for 8 GPUs",
    ),
    "mi300": Links(
        896 / 2,
        400 / 8,
        192,
        "AMD Instinct MI300X Platform, data sheet: Infinity Fabric of 896 GB/s between 8 GPUs, "
        "192 GB each. Assumed: a network card of 400 Gb/s for each GPU",
    ),
}


def gpu_with_links(name: str) -> tuple[Gpu, Links]:
    """The GPU of this name, in any case, and what joins it to others.

    Raises:
        UserError: there is none, or a table of links has no line for it.
    """
    known = named(name.strip(), LINKS)
    if known not in LINKS:
        raise UserError(
            f"--gpu must be one of {', '.join(LINKS)}, got {name!r}{did_you_mean(known, LINKS)}"
        )
    return GPUS[known], LINKS[known]


def changed(
    links: Links,
    *,
    nvlink_gbs: float | None = None,
    network_gbs: float | None = None,
    memory_gb: float | None = None,
) -> Links:
    """The links with what a user knows better; None leaves what is there."""
    own = {"nvlink": nvlink_gbs, "network": network_gbs, "memory": memory_gb}
    given = {name: value for name, value in own.items() if value is not None}
    if not given:
        return links
    options = ", ".join(f"{name} = {value:g}" for name, value in given.items())
    return links._replace(**given, source=f"{links.source}. From the command line: {options}")
