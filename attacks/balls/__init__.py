"""Norms: one class in one file each.

Importing this package registers those that come with ironmoe, in the order in which help and error
messages name them.
"""

# isort: off
from ironmoe.attacks.balls import linf as linf
from ironmoe.attacks.balls import l2 as l2
from ironmoe.attacks.balls import l1 as l1
