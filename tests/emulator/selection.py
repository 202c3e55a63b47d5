"""Which kernel tests run on compiled code: those of numbers, at few enough sizes for some minutes
on two cores.
"""

from typing import Any

LEFT_OUT = {  # files: what they test is no number, or needs a real device's memory
    "test_demand.py",
    "test_large_offsets.py",
    "test_written_once.py",  # looks into the interpreter; here every launch is watched
}
# Of each test the parts of ids that run; none: every id does. A test of these files that is not
# here does not run.
TESTS: dict[str, dict[str, tuple[str, ...]]] = {
    "test_grouped_matmul.py": {
        "test_error_is_at_most_twice_that_of_plain_torch": (
            "float32-bias",
            "float16-no bias",
            "bfloat16-bias",
        ),
        "test_any_shape_is_exact_in_small_integers": (),
        "test_inputs_of_any_layout": ("dtype1",),
        "test_zero_strides": ("shape0", "shape2"),
        "test_empty_experts_and_one_that_has_all": ("50-counts0", "50-counts1", "0-counts3"),
        "test_gathered_rows_and_activation": (
            "as it is-dtype0-swiglu",
            "persistent-dtype1",
            "no box-dtype1-swiglu",
            "as it is-dtype1-relu",
        ),
    },
    "test_expert_mlp.py": {
        "test_error_is_at_most_twice_that_of_plain_torch": (
            "bfloat16-gelu-True",
            "bfloat16-swiglu-True",
            "bfloat16-clamped_swiglu_interleaved-False",
            "float32-swiglu-True",
            "bfloat16-relu2-True",
            "float16-geglu-True",
        ),
        "test_unit_and_slope_from_minus_40_to_40_and_at_the_kinks": (
            "quick_gelu",
            "-silu",
            "gelu_tanh",
            "clamped_swiglu",
            "limited_swiglu",
        ),
        "test_odd_sizes": (
            "K = 1-swiglu",
            "K = E-clamped",
            "all of size 1-swiglu",
            "all dropped-clamped",
            "many tiles",
            "more tiles",
        ),
        "test_one_expert_takes_all": ("2",),
        "test_any_shape_is_exact_in_small_integers": (),
        "test_inputs_of_any_layout": (
            "not aligned-dtype2-clamped",
            "transposed-dtype2-clamped",
            "first axis last-dtype2-clamped",
        ),
        "test_zero_strides": ("axis2",),
        "test_dropped_choices_give_nothing_and_their_gates_are_not_read": (),
        "test_runs_repeat_their_bits_and_frozen_weights_change_none": ("dtype1",),
    },
    "test_large_tiles.py": {
        "test_error_is_at_most_twice_that_of_plain_torch": (
            "dtype1-swiglu-136",
            "dtype1-gelu-64",
            "dtype1-clamped_swiglu_interleaved-192",
        ),
        "test_no_bit_depends_on_the_order_of_programs": ("64-True",),
    },
    "test_combine.py": {
        "test_error_is_at_most_twice_that_of_plain_torch": (
            "dtype2",
            "-31-",
            "-48-",
            "1500-dtype0",
        ),
        "test_any_shape": (),
        "test_rows_and_dy_of_any_layout": (),
        "test_dy_with_zero_strides": (),
    },
    "test_dispatch.py": {
        "test_plan_is_a_stable_sort": (),
        "test_plan_of_any_number_of_segments_and_blocks": ("129-64", "200-8", "1-8-1"),
        "test_plan_of_many_experts": ("255", "256", "1024"),
        "test_choices_out_of_range_are_dropped": (),
        "test_tiles_cover_each_row_once_and_hold_one_expert": (),
    },
    "test_topk.py": {
        "test_route_is_the_twin": (),
        "test_backward_is_autograd_through_the_twin": (),
        "test_sizes": (
            "1000-7-softmax-score_first",
            "160-6-sigmoid-topk_first",
            "32-32-sqrtsoftplus-score_first",
            "1-1-softmax",
        ),
        "test_groups": ("256-8-4-8-top2_sum", "160-8-3-6-max"),
        "test_ties_go_to_the_lower_index": (),
        "test_infinite_logits": ("None", "groups2"),
        "test_nan_counts_as_the_largest": (),
        "test_far_logits_keep_their_precision": (),
        "test_dropped_choices_add_nothing": ("score_first",),
        "test_more_rows_than_one_program_takes": (),
        "test_every_score_is_its_definition": (),
        "test_the_kernels_refuse_a_score_they_do_not_know": (),
    },
    "test_attack_step.py": {
        "test_linf_gives_the_bits_of_the_twin": (),
        "test_l2_against_float64": (),
        "test_other_boxes": (),
        "test_strided_tensors": (),
        "test_gradients_that_are_not_finite_do_what_the_twin_does": (),
    },
}


def runs(item: Any) -> bool:
    """Whether a collected test is run.

    Tests of files that are not here, say of new kernels, all are.
    """
    if "device" not in item.fixturenames or item.path.name in LEFT_OUT:
        return False
    chosen = TESTS.get(item.path.name)
    if chosen is None:
        return True
    parts = chosen.get(item.originalname)
    return parts is not None and (not parts or any(part in item.callspec.id for part in parts))


def missing(items: list[Any]) -> list[str]:
    """What is chosen above in a file that was collected, and is not among its tests any more."""
    names = {item.path.name for item in items}
    ids: dict[tuple[str, str], list[str]] = {}
    for item in items:
        call = getattr(item, "callspec", None)
        ids.setdefault((item.path.name, item.originalname), []).append(call.id if call else "")
    found = []
    for file, tests in TESTS.items():
        for test, parts in tests.items() if file in names else ():
            if (file, test) not in ids:
                found.append(f"{file}::{test}")
            known = ids.get((file, test), [])
            found += [f"{file}::{test}[{p}]" for p in parts if not any(p in name for name in known)]
    return found
