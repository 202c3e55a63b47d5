"""The attacks, one file each.

Importing this package registers those that come with ironmoe. Help, error messages and
docs/attacks.md name them in the order below.
"""

from ironmoe.attacks import registry
from ironmoe.attacks.methods.apgd import APGD
from ironmoe.attacks.methods.carlini_wagner import CW
from ironmoe.attacks.methods.deepfool import DeepFool
from ironmoe.attacks.methods.fab import FAB
from ironmoe.attacks.methods.fgsm import FGSM
from ironmoe.attacks.methods.hopskipjump import HopSkipJump
from ironmoe.attacks.methods.mifgsm import MIFGSM
from ironmoe.attacks.methods.pgd import PGD
from ironmoe.attacks.methods.square import Square

registry.arrange(FGSM, PGD, MIFGSM, APGD, FAB, Square, HopSkipJump, DeepFool, CW)
