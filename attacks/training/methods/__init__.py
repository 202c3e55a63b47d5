"""The training methods, one in each file.

Importing this package registers those that come with ironmoe. Help, error messages and
docs/training.md name them in the order below.
"""

from ironmoe.attacks.training import registry
from ironmoe.attacks.training.methods.alternating import Alternating
from ironmoe.attacks.training.methods.fgsm_rs import FGSMRS
from ironmoe.attacks.training.methods.free import Free
from ironmoe.attacks.training.methods.mart import MART
from ironmoe.attacks.training.methods.n_fgsm import NFGSM
from ironmoe.attacks.training.methods.pgd_at import PGDAT
from ironmoe.attacks.training.methods.routing_consistency import RoutingConsistency
from ironmoe.attacks.training.methods.second_ranked import SecondRanked
from ironmoe.attacks.training.methods.standard import Standard
from ironmoe.attacks.training.methods.trades import TRADES

registry.arrange(
    Standard,
    PGDAT,
    FGSMRS,
    NFGSM,
    Free,
    TRADES,
    MART,
    Alternating,
    SecondRanked,
    RoutingConsistency,
)
