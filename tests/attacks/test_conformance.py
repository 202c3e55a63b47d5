"""Every registered attack keeps the same promises, in every norm that it takes.

A new attack is tested here as soon as it is registered. A failure names the attack and the norm.
"""

import conformance


def test_every_attack_reaches_the_optimum_of_a_linear_model_and_not_more():
    conformance.holds_for_all(conformance.reaches_the_closed_form)


def test_every_attack_stays_in_ball_and_box_and_leaves_misclassified_images_alone():
    conformance.holds_for_all(conformance.stays_in_ball_and_box)


def test_every_attack_reaches_the_class_it_is_given_or_refuses_it():
    conformance.holds_for_all(conformance.reaches_targets_or_refuses_them)


def test_every_attack_counts_its_passes():
    conformance.holds_for_all(conformance.counts_its_passes)


def test_every_attack_keeps_groups_together_or_refuses_them():
    conformance.holds_for_all(conformance.keeps_groups_together_or_refuses_them)


def test_no_attack_depends_on_batch_size_or_order():
    conformance.holds_for_all(conformance.does_not_depend_on_the_batch)


def test_every_attack_goes_on_from_a_cut_journal(tmp_path):
    cases = conformance.one_norm_each(conformance.cases())  # a journal is the same in every norm
    conformance.holds_for_all(conformance.goes_on_from_a_cut_journal, tmp_path, among=cases)
