"""The kinds of models, one file each.

Importing this package registers them. Help and error texts name them in the order below.
"""

from ironmoe.bench.models.kinds import hugging_face as hugging_face
from ironmoe.bench.models.kinds import vmoe as vmoe
