"""The kinds of models, one file each.

Importing this package registers them. Help and error texts name them in the order below.
"""

# isort: off
from ironmoe.bench.models.kinds import timm_models as timm_models
from ironmoe.bench.models.kinds import hugging_face as hugging_face
from ironmoe.bench.models.kinds import torchvision_models as torchvision_models
from ironmoe.bench.models.kinds import robustbench_models as robustbench_models
from ironmoe.bench.models.kinds import vmoe as vmoe
from ironmoe.bench.models.kinds import exported as exported
from ironmoe.bench.models.kinds import torchscript as torchscript
