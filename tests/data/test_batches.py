"""TensorBatches: order, shares of several processes, and augmentation against torchvision's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vbdcompress.data import TensorBatches
from vbdcompress.data.batches import CROP_PADDING, examples_at_once


def number(count: int) -> tuple[Tensor, Tensor]:
    """Inputs [count, 1] and labels [count], both 0, 1, 2 ..."""
    return torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count)


def labels_of(batches: TensorBatches) -> list[list[int]]:
    found = []
    for inputs, labels in batches:
        assert torch.equal(inputs[:, 0].long(), labels)
        found.append(labels.tolist())
    return found


def test_batches_in_order_end_with_a_partial_one() -> None:
    batches = TensorBatches(*number(7), 3)
    assert labels_of(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(batches) == 3
    assert batches.num_examples == 7


def test_shuffled_batches_leave_the_partial_one_to_another_epoch() -> None:
    batches = TensorBatches(*number(7), 3, shuffle=True)
    seen = set()
    for epoch in range(12):
        batches.set_epoch(epoch)
        order = labels_of(batches)
        assert [len(batch) for batch in order] == [3, 3]
        assert len(batches) == 2
        assert len({label for batch in order for label in batch}) == 6
        seen |= {label for batch in order for label in batch}
    assert seen == set(range(7))


def test_shuffled_batches_are_decided_by_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, noise: int) -> list[list[int]]:
        torch.manual_seed(noise)  # the global generator has no say
        batches = TensorBatches(*number(40), 10, shuffle=True, seed=seed)
        batches.set_epoch(epoch)
        return labels_of(batches)

    assert order(0, 0, 1) == order(0, 0, 2)
    different = [order(seed, epoch, 1) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({str(batches) for batches in different}) == 9


def test_batch_size_is_at_most_the_set() -> None:
    batches = TensorBatches(*number(5), 100, shuffle=True)
    assert [len(batch) for batch in labels_of(batches)] == [5]


def test_batches_without_examples_are_none() -> None:
    batches = TensorBatches(*number(0), 4)
    assert len(batches) == 0
    assert list(batches) == []


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("count", "batch_size", "world_size"), [(12, 4, 2), (11, 5, 2), (23, 7, 3)])
def test_shares_of_all_processes_make_the_batches_of_one(
    shuffle: bool, count: int, batch_size: int, world_size: int
) -> None:
    whole = TensorBatches(*number(count), batch_size, shuffle=shuffle, seed=3)
    ranks = [whole.on(torch.device("cpu"), rank, world_size) for rank in range(world_size)]
    for batches in (whole, *ranks):
        batches.set_epoch(5)
    expected = labels_of(whole)
    shares = [labels_of(batches) for batches in ranks]
    joined = [[label for share in batch for label in share] for batch in zip(*shares, strict=True)]
    # a last batch smaller than the world is left out: an empty share has no mean loss
    assert joined == [batch for batch in expected if len(batch) >= world_size]
    assert all(batch for share in shares for batch in share)


def test_augmented_shares_of_all_processes_make_the_batches_of_one() -> None:
    images = torch.rand(9, 2, 6, 6)
    whole = TensorBatches(images, torch.arange(9), 9, augment="crop-flip")
    ranks = [whole.on(torch.device("cpu"), rank, 2) for rank in range(2)]
    (expected, _), *_ = whole
    joined = torch.cat([inputs for batches in ranks for inputs, _ in batches])
    assert torch.equal(joined, expected)


def possible_views(image: Tensor, flip: bool) -> dict[tuple[int, int, bool], Tensor]:
    """Every shift (and mirror image) of one image by torchvision's crop, padded with zeros."""
    height, width = image.shape[1:]
    padded = F.pad(image, [CROP_PADDING] * 4)
    views = {}
    for top in range(2 * CROP_PADDING + 1):
        for left in range(2 * CROP_PADDING + 1):
            crop = tv.crop(padded, top, left, height, width)
            views[top, left, False] = crop
            if flip:
                views[top, left, True] = tv.horizontal_flip(crop)
    return views


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
def test_augmentation_gives_torchvisions_crops_one_draw_an_image(augment: str) -> None:
    # larger than the shift, so that no two views are alike
    images = torch.rand(300, 3, 10, 12) + 0.1
    batches = TensorBatches(images, torch.arange(300), 300, augment=augment)
    ((inputs, labels),) = batches
    drawn = []
    for found, label in zip(inputs, labels, strict=True):
        views = possible_views(images[label], augment == "crop-flip")
        drawn += [key for key, view in views.items() if torch.equal(view, found)]
    assert len(drawn) == 300  # each is exactly one of the views
    assert {top for top, _, _ in drawn} == {left for _, left, _ in drawn} == set(range(9))
    assert len(set(drawn)) > 60  # 81 or 162 views, drawn 300 times
    mirrored = sum(flipped for _, _, flipped in drawn)
    assert 110 < mirrored < 190 if augment == "crop-flip" else mirrored == 0


def test_augmentation_shifts_by_at_most_the_pixels_asked_for() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1
    batches = TensorBatches(
        image.expand(400, 1, 9, 9), torch.zeros(400, dtype=torch.int64), 400, augment="crop", pixels=2
    )
    ((inputs, _),) = list(batches)
    places = {tuple(place) for place in inputs[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}


def test_augmentation_differs_between_epochs_and_repeats_itself() -> None:
    images = torch.rand(20, 1, 6, 6)
    batches = TensorBatches(images, torch.arange(20), 20, augment="crop-flip", seed=1)

    def draw(epoch: int) -> Tensor:
        batches.set_epoch(epoch)
        return next(iter(batches))[0]

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_augmentation_differs_between_batches() -> None:
    image = torch.rand(1, 1, 6, 6).expand(40, 1, 6, 6)
    first, second = TensorBatches(image, torch.arange(40), 20, augment="crop")
    assert not torch.equal(first[0], second[0])


def test_on_moves_the_set_and_keeps_the_order() -> None:
    batches = TensorBatches(*number(9), 3, shuffle=True, seed=4)
    assert labels_of(batches.on(torch.device("cpu"), 0, 1)) == labels_of(batches)
    moved = batches.on(torch.device("meta"), 0, 1)
    assert moved.inputs.is_meta
    assert moved.labels.is_meta


@pytest.mark.parametrize("shuffle", [False, True])
def test_taught_batches_keep_each_output_with_its_input(shuffle: bool) -> None:
    inputs, labels = number(23)
    batches = (
        TensorBatches(inputs, labels, 5, shuffle=shuffle)
        .taught(10 * inputs[None])
        .on(torch.device("cpu"), 0, 1)
    )
    for _ in range(2):
        for found, (label, output) in batches:
            assert torch.equal(output, 10 * found)
            assert torch.equal(found[:, 0].long(), label)
    assert sum(len(found) for found, _ in batches) == (20 if shuffle else 23)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("pixels", "views"), [(0, 1), (1, 9), (2, 25)])
def test_shifted_images_come_with_what_the_teacher_says_of_that_shift(
    shuffle: bool, pixels: int, views: int
) -> None:
    images = torch.rand(30, 2, 6, 6)
    batches = TensorBatches(
        images, torch.arange(30), 10, shuffle=shuffle, augment="crop", pixels=pixels, world_size=2, rank=1
    )
    assert batches.views == views
    shown = torch.stack([batches.view(number) for number in range(views)])
    assert len({tuple(view.flatten().tolist()) for view in shown}) == views
    for found, (_, output) in batches.taught(10 * shown):
        assert torch.equal(output, 10 * found)


def test_mirrored_images_have_no_list_of_views() -> None:
    images = torch.rand(4, 1, 4, 4)
    assert TensorBatches(images, torch.arange(4), 2, augment="crop-flip").views is None
    assert TensorBatches(images, torch.arange(4), 2).views == 1


@pytest.mark.parametrize(("shape", "count"), [((1, 28, 28), 1000), ((3, 32, 32), 1000), ((3, 224, 224), 83)])
def test_fewer_large_images_are_measured_in_one_call(shape: tuple[int, ...], count: int) -> None:
    assert examples_at_once(torch.empty(5000, *shape, device="meta")) == count
    assert examples_at_once(torch.empty(2, 3, 4000, 4000, device="meta")) == 1
