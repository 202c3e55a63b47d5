"""What lies inside the wrappers that other libraries put around a module.

A wrapper takes the place of a router or a capacity and has another class. Whoever wants to know
what the module is looks inside; whoever runs it calls the wrapper, which does its own work then.
"""

from torch import nn

from ironmoe.moe.routers.groups import Grouped

# Where each wrapper keeps the module that it calls.
WRAPPERS = (
    "_orig_mod",  # torch.compile
    "base_layer",  # PEFT's adapters
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "module",  # DistributedDataParallel, DataParallel, AveragedModel
    "_forward_module",  # Lightning Fabric
    "_module",  # Opacus
)


# These are named as steps of a path to a weight, which the plain model has without them.
STEPS = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """The name that a module or a weight has without ``torch.compile`` and activation
    checkpointing."""
    return ".".join(step for step in name.split(".") if step not in STEPS)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers around it; the module itself where there is none. A module of
    another library, too, is a wrapper if it has nothing of its own but one router by groups."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    """The module that this wrapper calls; None if this is no wrapper that is known."""
    children = module._modules
    if "modules_to_save" in children and "original_module" in children:
        return _active_copy(module)
    known = next((children[name] for name in WRAPPERS if children.get(name) is not None), None)
    if known is not None or len(children) != 1 or module._parameters:
        return known
    (only,) = children.values()
    return only if only is not None and isinstance(unwrapped(only), Grouped) else None


def _active_copy(wrapper: nn.Module) -> nn.Module:
    """PEFT's ModulesToSaveWrapper trains a copy of a module for each adapter, and calls the copy of
    the active one, or the original where adapters are switched off."""
    copies = wrapper._modules["modules_to_save"]
    active = getattr(wrapper, "active_adapter", None)
    names = [active] if isinstance(active, str) else list(active or ())
    chosen = next((name for name in names if copies is not None and name in copies._modules), None)
    if chosen is None or copies is None or getattr(wrapper, "disable_adapters", False):
        return wrapper.get_submodule("original_module")
    return copies.get_submodule(chosen)
