"""The attacks, one file each.

Importing this package registers those that come with ironmoe, in the order in which help, error
messages and docs/attacks.md name them.
"""

# isort: off
from ironmoe.attacks.methods.fgsm import FGSM as FGSM
from ironmoe.attacks.methods.pgd import PGD as PGD
from ironmoe.attacks.methods.mifgsm import MIFGSM as MIFGSM
from ironmoe.attacks.methods.apgd import APGD as APGD
from ironmoe.attacks.methods.fab import FAB as FAB
from ironmoe.attacks.methods.square import Square as Square
from ironmoe.attacks.methods.deepfool import DeepFool as DeepFool
from ironmoe.attacks.methods.carlini_wagner import CW as CW
