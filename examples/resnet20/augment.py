"""Random crops and flips of a whole batch at once, on the device that holds the images."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .data import SIZE, Data

PAD = 4
_PADDED = SIZE + 2 * PAD


class Augmenter:
    """Holds the training images, padded once, and cuts normalised batches out of them.

    All images lie in one long table of pixels. A crop is then a table of row numbers: where the
    crop starts, plus the same 32 * 32 offsets for every image (or those that read each line
    backwards). Two small additions and one gather make a batch, whatever its size.
    """

    def __init__(self, data: Data, device: torch.device) -> None:
        images = data.train.images
        padded = images.new_zeros(len(images), _PADDED, _PADDED, 3)
        padded[:, PAD:-PAD, PAD:-PAD] = images
        self._pixels = padded.to(device).view(-1, 3)
        self._labels = data.train.labels.to(device)
        self._flips = data.flips
        mean, std = _channel_statistics(images)
        self._mean = mean.to(device).view(3, 1, 1)
        self._scale = (1 / std).to(device).view(3, 1, 1)
        line = torch.arange(SIZE)
        crop = (line[:, None] * _PADDED + line).flatten()
        mirrored = (line[:, None] * _PADDED + line.flip(0)).flatten()
        self._offsets = torch.stack((crop, mirrored)).to(device)

    def epoch(
        self, seed: int, epoch: int, batch_size: int, part: slice = slice(None)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches of an epoch; images that do not fill a last batch are left for another.

        Only ``part`` of the rows of each batch is made.

        Everything random follows from ``(seed, epoch)`` and is drawn on the CPU, so that a run
        that is resumed, or that moves to another device, sees the same batches.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        device, count = self._labels.device, len(self._labels)
        order = torch.randperm(count, generator=generator)
        shift = torch.randint(2 * PAD + 1, (2, count), generator=generator)
        mirror = torch.randint(2, (count,), generator=generator) * int(self._flips)
        starts = ((order * _PADDED + shift[0]) * _PADDED + shift[1]).to(device)
        order, mirror = order.to(device), mirror.to(device)
        begin, end, _ = part.indices(batch_size)
        for first in range(0, count - batch_size + 1, batch_size):
            batch = slice(first + begin, first + end)
            rows = starts[batch, None] + self._offsets[mirror[batch]]
            pixels = self._pixels.index_select(0, rows.view(-1))
            yield self.normalise(pixels.view(-1, SIZE, SIZE, 3)), self._labels[order[batch]]

    def normalise(self, images: Tensor) -> Tensor:
        """Images (N, 32, 32, 3) as floats (N, 3, 32, 32), channels last in memory."""
        normalised: Tensor = (images.permute(0, 3, 1, 2) - self._mean) * self._scale
        return normalised


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, from exact counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack(
        [torch.bincount(images[..., channel].flatten(), minlength=256) for channel in range(3)]
    ).double()
    total = counts.sum(1)
    mean = (counts * values).sum(1) / total
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / total
    return mean.float(), variance.sqrt().clamp_min(1.0).float()
