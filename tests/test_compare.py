"""How far two outputs are apart."""

import pytest
import torch

from vbdcompress.compare import relative_difference


def test_the_largest_difference_counts_beside_the_largest_output() -> None:
    expected, found = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0])
    assert relative_difference([expected], [found]) == pytest.approx(0.5 / 4)
    assert relative_difference([expected, expected], [expected, found]) == pytest.approx(0.5 / 4)


def test_both_parts_of_complex_outputs_count() -> None:
    expected, found = torch.tensor([1 + 2j, 3 - 4j]), torch.tensor([1 + 5j, 3 - 4j])
    assert relative_difference([expected], [found]) == pytest.approx(3 / 4)  # of the largest part
    assert relative_difference([expected], [expected.clone()]) == 0


@pytest.mark.parametrize("found", [[], [torch.ones(3)], [torch.ones(2)] * 2, [torch.full([2], torch.nan)]])
def test_other_shapes_and_nan_are_infinitely_far(found: list[torch.Tensor]) -> None:
    assert relative_difference([torch.ones(2)], found) == float("inf")


def test_conjugated_outputs_are_compared() -> None:
    output = torch.tensor([1 + 2j, 3 - 4j])
    assert relative_difference([output.conj()], [output]) == pytest.approx(8 / 4)


def test_the_same_infinities_and_nan_are_no_difference() -> None:
    mask = torch.tensor([0.0, -torch.inf, torch.nan])
    assert relative_difference([mask], [mask.clone()]) == 0
