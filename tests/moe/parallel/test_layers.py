"""Layers and models whose experts are shared out over 2 and 4 ranks. All cases of a size run in one
world, because imports take most of the time."""

from two_processes import run_in_processes

IMPORTS = """
import torch._dynamo  # an optimizer imports it, and checkpointing
import torch.distributed.tensor
import torch.distributed.fsdp
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
import faults_on_ranks, layers_on_ranks, meshes_on_ranks
"""
PROGRAM = """
mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))["ep"]

def run(*cases):
    for case in cases:
        case(mesh, rank)
        dist.barrier()
"""
OF_TWO = """
run(*layers_on_ranks.CASES)
faults_on_ranks.a_rank_that_is_killed_under_fsdp(mesh, rank)
"""
OF_FOUR = """
run(*layers_on_ranks.CASES, *meshes_on_ranks.CASES, *faults_on_ranks.CASES)
faults_on_ranks.a_rank_that_is_killed(mesh, rank)
"""
SURVIVED = """
Path(f"survived-{rank}").touch()
for child in children:
    os.waitpid(child, 0)
os._exit(0)
"""


def test_two_ranks_compute_what_one_process_does_and_one_survives_the_other(tmp_path):
    run_in_processes(2, PROGRAM + OF_TWO + SURVIVED, tmp_path, before=IMPORTS)
    assert (tmp_path / "survived-0").exists()


def test_four_ranks_compute_what_one_process_does_and_survive_two_of_them(tmp_path):
    run_in_processes(4, PROGRAM + OF_FOUR + SURVIVED, tmp_path, before=IMPORTS)
    assert {file.name for file in tmp_path.glob("survived-*")} == {"survived-0", "survived-2"}
