"""A small data set on the device as tensors: shuffled, augmented and batched there.

Worker processes and per-example Python would cost more than the networks that we train here.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Augment = Literal["none", "crop", "crop-flip"]
CROP_PADDING = 4
DIGESTED = 500
# Examples that are measured in one call, and numbers in them: 83 images of 224 pixels, whose outputs inside a
# large network take a few gigabytes
AT_ONCE, NUMBERS_AT_ONCE = 1000, 12 * 2**20


def examples_at_once(inputs: Tensor) -> int:
    """How many of such inputs, [n, ...], to measure in one call."""
    return max(1, min(AT_ONCE, NUMBERS_AT_ONCE // max(1, inputs[:1].numel())))


@dataclass(eq=False)
class TensorBatches:
    """Iterates over (input, label) batches of tensors that lie on one device.

    In one process of several it gives each global batch's own share, so that the union over the
    processes is what one process would see.

    Attributes:
        inputs: [n, ...] normalised, float.
        labels: [n] integer.
        batch_size: over all processes; the last batch may be smaller unless shuffled. One smaller
            than the number of processes is left out, for an empty share has no mean loss.
        shuffle: draw a new order for each epoch from (seed, epoch), and leave out a last
            partial batch, which another epoch's order will cover.
        augment: "crop" shifts each image, "crop-flip" also mirrors half of them.
        pixels: largest shift in each direction, at most CROP_PADDING.
        seed: of the order and the augmentation.
        rank, world_size: this process among all.
        outputs: [shifts, n, ...] what a teacher says of each input, shifted in every way that `views`
            lists; batches are then (input, (label, output)).
        epoch: decides the order, with the seed.
    """

    inputs: Tensor
    labels: Tensor
    batch_size: int
    _: KW_ONLY
    shuffle: bool = False
    augment: Augment = "none"
    pixels: int = CROP_PADDING
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    outputs: Tensor | None = None
    epoch: int = 0

    def __post_init__(self) -> None:
        self.batch_size = max(1, min(self.batch_size, len(self.labels)))

    @property
    def num_examples(self) -> int:
        """Examples in the set, over all processes."""
        return len(self.labels)

    def digest(self) -> str:
        """Tells this set from another of its size: a hash of all labels and of some inputs."""
        some = self.inputs[:: max(1, len(self.inputs) // DIGESTED)]
        found = hashlib.sha256()
        for tensor in (self.labels, some):
            found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order: the same epoch gives the same order, so that a resumed run repeats it."""
        self.epoch = epoch

    def on(self, device: torch.device, rank: int, world_size: int) -> "TensorBatches":
        """The same set on a device, for one process among several."""
        outputs = None if self.outputs is None else self.outputs.to(device)
        inputs, labels = self.inputs.to(device), self.labels.to(device)
        return replace(
            self, inputs=inputs, labels=labels, outputs=outputs, rank=rank, world_size=world_size, epoch=0
        )

    @property
    def views(self) -> int | None:
        """In how many ways an input may be shown; None where images are mirrored, too."""
        known = {"none": 1, "crop": (2 * self.pixels + 1) ** 2}
        return known.get(self.augment)

    def view(self, number: int) -> Tensor:
        """[n, ...]: all inputs, shown in one way of `views`."""
        if self.augment == "none":
            return self.inputs
        top, left = divmod(number, 2 * self.pixels + 1)
        shifts = torch.tensor([top, left], device=self.labels.device) + CROP_PADDING - self.pixels
        return _augment_images(self.inputs, shifts[:, None, None].expand(2, len(self.inputs), 1), None)

    def taught(self, outputs: Tensor) -> "TensorBatches":
        """The same set with a teacher's outputs for each view, [views, n, ...], beside the labels."""
        return replace(self, outputs=outputs)

    def __len__(self) -> int:
        full, rest = divmod(self.num_examples, self.batch_size)
        return full if self.shuffle or rest < self.world_size else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        device = self.labels.device
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + self.epoch)
        order = None
        if self.shuffle:
            order = torch.randperm(self.num_examples, generator=generator, device=device)
        for batch in range(len(self)):
            start = batch * self.batch_size
            size = min(self.batch_size, self.num_examples - start)
            share = slice(size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size)
            where = slice(start + share.start, start + share.stop)
            chosen = where if order is None else order[where]
            inputs = self.inputs[chosen]
            view: Tensor | int = 0
            if self.augment != "none":
                # drawn for the whole batch, so that no two processes repeat each other's draws
                largest = CROP_PADDING + self.pixels
                shifts = torch.randint(
                    CROP_PADDING - self.pixels, largest + 1, (2, size, 1), generator=generator, device=device
                )
                mirrored = torch.rand(size, 1, generator=generator, device=device) < 0.5
                inputs = _augment_images(
                    inputs, shifts[:, share], mirrored[share] if self.augment == "crop-flip" else None
                )
                if self.outputs is not None:
                    top, left = shifts[:, share].squeeze(-1) - CROP_PADDING + self.pixels
                    view = top * (2 * self.pixels + 1) + left
            labels = self.labels[chosen]
            if self.outputs is None:
                yield inputs, labels
            else:
                rows = torch.arange(self.num_examples, device=device)[where] if order is None else chosen
                yield inputs, (labels, self.outputs[view, rows])


def _augment_images(images: Tensor, shifts: Tensor, mirrored: Tensor | None) -> Tensor:
    """Each image shifted, and perhaps mirrored, by a draw of its own, in one gather of windows.

    torchvision.transforms.v2 draws once for a whole batch of tensors, which is a weaker
    augmentation, and a call for each image costs more than the network.

    Args:
        images: [n, c, h, w].
        shifts: [2, n, 1] pixels from the top and the left of the image padded by CROP_PADDING.
        mirrored: [n, 1] bool; None mirrors no image.
    """
    count, _, height, width = images.shape
    windows = F.pad(images, (CROP_PADDING,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = shifts.squeeze(-1)
    shifted = windows[torch.arange(count, device=images.device), :, top, left]
    if mirrored is None:
        return shifted
    return torch.where(mirrored[:, :, None, None], shifted.flip(-1), shifted)
