"""Help texts that follow from the registers of attacks and norms.

The registers import torch, which takes seconds. So a text has a place such as ``{norms}``, which is
filled in when somebody asks for the help of that command.
"""

from typing import Any

from typer.core import TyperCommand


class CommandWithLateHelp(TyperCommand):
    """A command whose help fills in what is registered at that moment.

    Typer has click's classes under a name of its own in some versions, so they are ``Any`` here.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        written = [getattr(option, "help", None) for option in self.params]
        values = _values()
        try:
            for option, text in zip(self.params, written, strict=True):
                if text:
                    _set_help(option, _filled(text, values))
            super().format_help(ctx, formatter)
        finally:
            for option, text in zip(self.params, written, strict=True):
                _set_help(option, text)


def _set_help(option: Any, text: str | None) -> None:
    if hasattr(option, "help"):
        option.help = text


def _filled(text: str, values: dict[str, str]) -> str:
    for place, value in values.items():
        text = text.replace("{" + place + "}", value)
    return text


def _values() -> dict[str, str]:
    """place → text."""
    from ironmoe.attacks import registry  # its classes are registered by ``ironmoe.attacks``
    from ironmoe.attacks.balls.ball import NORMS
    from ironmoe.bench.common.radii import usual_radii

    attacks = registry.named_attacks()
    norms = [f"**{norm}**" for norm in NORMS]

    def usual(setting: str) -> str:
        own = {name: attack.settings.get(setting) for name, attack in attacks.items()}
        return ", ".join(f"{value} for {name}" for name, value in own.items() if value is not None)

    return {
        "attacks": ", ".join(attacks),
        "norms": " or ".join([", ".join(norms[:-1]), norms[-1]]),
        "usual_radii": "; ".join(f"{usual_radii(norm)} in {norm}" for norm in NORMS),
        "usual_steps": usual("steps"),
        "usual_restarts": usual("restarts"),
        "usual_eot": usual("eot"),
    }
