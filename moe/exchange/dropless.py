"""Every row to the rank of its expert and back, however many there are.

One exchange of counts tells each rank how many rows will come. The host waits for it once a layer.

Shape suffixes: T tokens, R rows, D their width, P ranks, L experts of a rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ironmoe.kernels import Dispatch, Routing
from ironmoe.moe.exchange.agreement import Header, check_agreement, told
from ironmoe.moe.exchange.expert_rows import gathered, kept_rows, routing_of_rows
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.exchange.travel import Way, finish, start

# (rows (R, D), their routing (R, 1) to the experts of this rank) → what these experts give, (R, D)
Experts = Callable[[Tensor, Routing], Tensor]


def dropless(
    group: Group,
    header: Header,
    x_TD: Tensor,
    plan: Dispatch,
    experts: Experts,
    meanwhile: Callable[[], None],
) -> tuple[Tensor, Dispatch]:
    """The rows of tokens x (T, D), computed where their experts are: (what these give, (R, D); the
    plan of these rows).

    Args:
        plan: of the rows, sorted by all experts.
        experts: the experts of this rank.
        meanwhile: runs while rows travel to the experts.
    """
    counts_PL = plan.offsets.diff().long().view(group.size, -1)
    headers_PH, coming_PL = told(group, header, counts_PL)
    # one copy to the host for all that it has to know
    to_host = torch.cat([counts_PL.sum(1, keepdim=True), headers_PH, coming_PL], dim=1).tolist()
    check_agreement(group, header, [row[1 : 1 + len(header)] for row in to_host])
    send = [row[0] for row in to_host]
    receive = [sum(row[1 + len(header) :]) for row in to_host]

    plan = kept_rows(plan, sum(send))
    way = Way(group, send, receive)
    rows_RD = start(gathered(x_TD, plan), way)
    meanwhile()
    rows_RD = finish(rows_RD, way)

    num_experts = counts_PL.shape[1]
    own_L = torch.arange(num_experts, device=x_TD.device)
    experts_R = own_L.repeat(group.size).repeat_interleave(
        coming_PL.flatten(), output_size=sum(receive)
    )
    out_RD = experts(rows_RD, routing_of_rows(experts_R, x_TD, num_experts))
    return finish(start(out_RD, way.back), way.back), plan
