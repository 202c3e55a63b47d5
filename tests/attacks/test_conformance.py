"""Every registered attack keeps the same promises, in every norm that it takes.

A new attack is tested here as soon as it is registered. The id of a test names attack and norm, so
``-k apgd`` runs those of one attack.
"""

import conformance
import pytest

CASES = conformance.cases()

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_an_attack_reaches_the_optimum_of_a_linear_model_and_not_more(case):
    conformance.reaches_the_closed_form(case)


@every_case
def test_an_attack_stays_in_ball_and_box_and_leaves_misclassified_images_alone(case):
    conformance.stays_in_ball_and_box(case)


@every_case
def test_an_attack_keeps_to_radii_and_bounds_of_elements(case):
    conformance.keeps_to_radii_and_bounds_of_elements(case)


@every_case
def test_an_attack_reaches_the_optimum_of_a_linear_model_with_radii_of_elements(case):
    conformance.reaches_the_closed_form_with_radii_of_elements(case)


@every_case
def test_an_attack_keeps_to_the_grid_of_its_levels(case):
    conformance.keeps_to_the_grid(case)


@every_case
def test_an_attack_takes_a_tensor_of_one_number_as_the_number(case):
    conformance.takes_a_tensor_of_one_number_as_the_number(case)


@every_case
def test_an_attack_reaches_the_class_it_is_given_or_refuses_it(case):
    conformance.reaches_targets_or_refuses_them(case)


@every_case
def test_an_attack_counts_its_passes(case):
    conformance.counts_its_passes(case)


@every_case
def test_an_attack_keeps_groups_together_or_refuses_them(case):
    conformance.keeps_groups_together_or_refuses_them(case)


@every_case
def test_an_attack_does_not_depend_on_batch_size_or_order(case):
    conformance.does_not_depend_on_the_batch(case)


# A journal is the same in every norm.
@pytest.mark.parametrize("case", conformance.one_norm_each(CASES), ids=str)
def test_an_attack_goes_on_from_a_cut_journal(case, tmp_path):
    conformance.goes_on_from_a_cut_journal(case, tmp_path)
