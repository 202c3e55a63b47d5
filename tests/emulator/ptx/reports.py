"""What is wrong with a launch, in words."""


class Fault(Exception):
    """The emulator cannot go on: an instruction it does not know, a program that never ends."""


class Reports:
    """Faults after which a launch goes on. Each text once, for a fault in a loop is one fault."""

    LIMIT = 50

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def add(self, text: str) -> None:
        """Note a fault; beyond ``LIMIT`` different ones they are no news."""
        if text in self.texts or len(self.texts) < self.LIMIT:
            self.texts[text] = self.texts.get(text, 0) + 1
