"""What the report of a training is made from."""

from typing import Any, NamedTuple

from ironmoe.attacks import Flag, Proportion
from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.cells import brackets, counted, percent, value_of

Numbers = dict[str, Any]


class TrainingFacts(NamedTuple):
    """name: of the model; parameters: how many; classes: of the data; settings: of the run;
    held_out: images that chose the weights; training: what the run wrote when it was trained
    ("chosen", "seconds", "steps", "alpha_255", "warnings", "curves"); attack: report.json of the
    attack on test images, None without it."""

    name: str
    parameters: int
    classes: int
    settings: Numbers
    held_out: int
    training: Numbers
    attack: Numbers | None

    @property
    def title(self) -> str:
        method, data = self.settings["method"]["name"], self.settings["data"]
        return f"{self.name} trained by {method}: {data}"

    @property
    def is_standard(self) -> bool:
        """Whether it was trained on clean images."""
        return bool(self.settings["method"]["name"] == "standard")

    @property
    def curves(self) -> list[Numbers]:
        """The numbers of each epoch."""
        curves: list[Numbers] = self.training["curves"]
        return curves

    @property
    def chosen(self) -> Numbers:
        """The numbers of the epoch whose weights were chosen."""
        return self.curves[self.training["chosen"] - 1]

    @property
    def eps(self) -> str:
        return f"eps {exact(self.settings['method']['eps_255'])}/255"

    @property
    def tiles(self) -> list[tuple[str, str, str]]:
        """(what it is, share, interval) of the figures to see first: those of the test images, or
        of held-out images where no test image was attacked."""
        if self.attack is None:
            shares = (self.clean_held_out, self._proportion(self.chosen["robust"]))
            labels = ("held out, clean", f"held out, PGD-10 at {self.eps}")
            cells = [(percent(share), brackets(share.interval())) for share in shares]
        else:
            (worst,) = self.attack["worst_case"]
            labels = ("test, clean", f"test, APGD-T at {self.eps}")
            cells = [_parts(self.attack["report"]["clean"]), _parts(worst)]
        return [(label, *cell) for label, cell in zip(labels, cells, strict=True)]

    @property
    def checks(self) -> list[tuple[str, list[str]]]:
        """(state, cells) of the checks against false security, tripped ones first; none without an
        attack on test images."""
        stored = [] if self.attack is None else self.attack["report"]["checks"]
        flags = sorted((Flag.from_dict(flag) for flag in stored), key=lambda flag: not flag.tripped)
        return [
            (flag.state, [flag.name, flag.state, value_of(flag), flag.message]) for flag in flags
        ]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(label, text) of the final figures. Shares have 95 % Wilson intervals."""
        chosen = self.chosen
        steps, alpha = self.training["steps"], self.training["alpha_255"]
        lines = [
            ("parameters", f"{self.parameters / 1e3:.0f} k"),
            (
                "attack in training",
                "none" if self.is_standard else f"{counted(steps, 'step')} of {alpha:.3g}/255",
            ),
            ("training, seconds", f"{self.training['seconds']:.1f}"),
            ("chosen epoch", f"{self.training['chosen']} of {len(self.curves)}"),
            ("held-out images: clean", self._held_out(chosen["clean"])),
            (f"held-out images: PGD-10, {self.eps}", self._held_out(chosen["robust"])),
        ]
        if self.attack is not None:
            report = self.attack["report"]
            (worst,) = self.attack["worst_case"]
            lines += [
                ("test images: clean", _cell(report["clean"])),
                (f"test images: APGD-T, {self.eps}", _cell(worst)),
            ]
        lines += [
            (f"{layer}: largest load of an expert", f"{100 * share:.1f} %")
            for layer, share in chosen["load"].items()
        ]
        return lines

    @property
    def clean_held_out(self) -> Proportion:
        """Of the held-out images those that the chosen weights tell right."""
        return self._proportion(self.chosen["clean"])

    def _proportion(self, share: float) -> Proportion:
        return Proportion(round(share * self.held_out), self.held_out)

    def _held_out(self, share: float) -> str:
        proportion = self._proportion(share)
        return f"{percent(proportion)} {brackets(proportion.interval())}"


def _cell(stored: Numbers) -> str:
    return " ".join(_parts(stored))


def _parts(stored: Numbers) -> tuple[str, str]:
    """(share, interval)"""
    low, high = stored.get("wilson_95") or stored["interval_95"]
    value = stored["value"]
    ends = [stored["least"], stored["most"]] if value is None else [value]
    share = " to ".join(f"{100 * end:.1f}" for end in ends)
    return f"{share} %", brackets((low, high))
