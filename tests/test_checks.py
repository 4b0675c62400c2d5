import math

import pytest
import torch

from diffusion_core import checks

GOOD = torch.zeros(2, 3, 8, 8)


def test_what_is_right_passes():
    checks.picture_batch("x", GOOD, 3, 4)
    checks.labels("label", None, 2)
    checks.labels("label", torch.tensor([0, 1]), 2)
    checks.classes("label", torch.tensor([0, 3]), 3)
    checks.classes("label", None, 0)
    checks.seeds("seeds", torch.arange(3))
    checks.finite("x", GOOD)
    checks.within("x", torch.tensor([-1.0, 1.0]), -1.0, 1.0)


@pytest.mark.parametrize(
    ("check", "told"),
    [
        (
            lambda: checks.picture_batch("x", GOOD.to(torch.uint8), 3),
            "x: torch.uint8 .2, 3, 8, 8.; need a floating type",
        ),
        (lambda: checks.picture_batch("x", GOOD[0], 3), "x: .*; need .B, 3, H, W. with B of at least 1"),
        (lambda: checks.picture_batch("x", GOOD[:0], 3), "x: .*; need .B, 3, H, W. with B of at least 1"),
        (lambda: checks.picture_batch("x", GOOD, 1), "x: .*; need .B, 1, H, W."),
        (lambda: checks.picture_batch("x", GOOD, 3, 16), "x: .*; need H and W that are multiples of 16"),
        (lambda: checks.labels("label", torch.zeros(2), 2), "label: torch.float32 .2.; need torch.int64 .2., or None"),
        (lambda: checks.labels("label", torch.arange(3), 2), "label: torch.int64 .3.; need torch.int64 .2."),
        (lambda: checks.classes("label", torch.tensor([0, 5]), 3), "label: 5; need 0 to 2, or 3 for the null class"),
        (lambda: checks.classes("label", torch.tensor([-1]), 3), "label: -1; need 0 to 2"),
        (lambda: checks.classes("label", torch.tensor([0]), 0), "label: .0., but the model has no classes; give None"),
        (lambda: checks.seeds("seeds", torch.zeros(2)), "seeds: torch.float32 .2.; need torch.int64 .B."),
        (lambda: checks.seeds("seeds", torch.arange(0)), "seeds: torch.int64 .0.; need"),
        (lambda: checks.finite("x", torch.tensor([1.0, math.nan, math.inf])), "x: 2 of 3 values are NaN or infinite"),
        (lambda: checks.within("x", torch.tensor([-1.5, 0.0]), -1, 1), "x: values from -1.5 to 0; need -1 to 1"),
        (lambda: checks.within("x", torch.tensor([math.nan]), -1, 1), "x: 1 of 1 values are NaN"),
    ],
)
def test_what_is_wrong_is_told_with_its_name_what_was_found_and_what_is_needed(check, told):
    with pytest.raises(ValueError, match=told):
        check()
