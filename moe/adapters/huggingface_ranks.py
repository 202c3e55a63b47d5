"""Experts of a patched Hugging Face model as layers whose experts can be shared out over ranks."""

from functools import partial
from typing import Any

from torch import nn

from ironmoe.moe.adapters.huggingface import NAME, Choice
from ironmoe.moe.adapters.huggingface_activation import decide
from ironmoe.moe.adapters.huggingface_routing import ExpertSite, expert_sites
from ironmoe.moe.adapters.huggingface_saving import keep_recipes
from ironmoe.moe.adapters.recorded import recipe_of_model
from ironmoe.moe.exchange.expert_parallel import ExpertParallel
from ironmoe.moe.layers.ranks import check_no_adapter
from ironmoe.moe.routers.wrapped import WRAPPERS


class PatchedExperts(nn.Module):
    """An Experts module as ``share_out`` takes it (``ironmoe.moe.layers.ranks.ExpertLayer``). It
    holds nothing of its own and is made anew wherever it is asked for.

    Args:
        site: the Experts module, and the router beside it.
        outside: the Experts module, or the outermost wrapper of another library around it; name: of
            that in the model.
        block: the module that calls it; None where the model is the Experts module.
    """

    def __init__(
        self, site: ExpertSite, outside: nn.Module, name: str, block: nn.Module | None
    ) -> None:
        super().__init__()
        self.name = name
        self.outside = outside
        self._beside = (site, block)  # in a tuple, so that only weights of experts are its own

    def _experts(self) -> Any:
        return self._beside[0].experts

    @property
    def router(self) -> nn.Module | None:
        """The model's own, whose losses are the model's own, too."""
        return self._beside[0].router

    @property
    def num_experts(self) -> int:
        """E of the whole layer."""
        experts = self._experts()
        weight = experts.gate_up_proj if experts.has_gate else experts.up_proj
        return int(weight.shape[0])

    @property
    def expert_parallel(self) -> ExpertParallel | None:
        """How the experts are shared out. The Experts module remembers it, for its forward."""
        experts = self._experts()
        state: ExpertParallel | None = vars(experts).get("expert_parallel")
        return state

    @expert_parallel.setter
    def expert_parallel(self, state: ExpertParallel) -> None:
        experts, block = self._experts(), self._beside[1]
        experts.expert_parallel = state
        keep_recipes(recipe_of_model)  # which refuses to save a part
        if block is not None:
            # PEFT reads weights before the forward of the Experts module begins
            child = self.name.rpartition(".")[2]
            block.register_forward_pre_hook(partial(_refuse_adapter, child))

    def expert_modules(self) -> dict[str, nn.Module]:
        """The module that holds the weights, by its name.

        Raises:
            ValueError: the model is not patched, or this module keeps its own eager forward.
        """
        experts = self._experts()
        selected = experts.config._experts_implementation
        if selected != NAME:
            raise ValueError(
                "model must run on ironmoe's experts: call ironmoe.moe.huggingface.patch(model) "
                f"first, got {self.name} with experts_implementation = {selected!r}"
            )
        if not hasattr(experts, "_ironmoe"):  # selected by name, and never run
            experts._ironmoe = Choice(decide(experts))
        if experts._ironmoe.activation is None:
            raise ValueError(
                f"model must have experts that ironmoe can run, got {self.name}: "
                f"{type(experts).__name__} keeps the eager experts of transformers, which know no "
                "other rank"
            )
        return {self.name or type(experts).__name__: self.outside}


def patched_experts(model: nn.Module) -> dict[str, PatchedExperts]:
    """Each Experts module of a model by its name, patched or not."""
    layers = {}
    for site in expert_sites(model):
        path = site.name.split(".")
        while len(path) > 1 and path[-1] in WRAPPERS:
            path.pop()
        around = ".".join(path)
        block = model.get_submodule(".".join(path[:-1])) if around else None
        layers[site.name] = PatchedExperts(site, model.get_submodule(around), around, block)
    return layers


def _refuse_adapter(child: str, block: nn.Module, _: Any) -> None:
    check_no_adapter(block.get_submodule(child))
