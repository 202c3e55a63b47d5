"""Names that people type, in any case."""

import pytest

from ironmoe.bench.common.choices import chosen_names
from ironmoe.bench.common.user_error import UserError

KNOWN = ("pgd", "AutoAttack", "bf16")


def test_names_are_found_in_any_case_and_each_once():
    assert chosen_names("--parts", " PGD,autoattack, pgd", KNOWN) == ("pgd", "AutoAttack")


@pytest.mark.parametrize(
    ("text", "end"),
    [("autoatack", "got 'autoatack'; did you mean AutoAttack"), ("pgd,", "got ''"), ("x", "'x'")],
)
def test_an_unknown_name_is_refused_with_what_was_meant(text, end):
    with pytest.raises(UserError, match="--parts must be among pgd, AutoAttack, bf16, ") as refused:
        chosen_names("--parts", text, KNOWN)
    assert end in str(refused.value)
    with pytest.raises(KeyError):
        chosen_names("--parts", text, KNOWN, KeyError)
