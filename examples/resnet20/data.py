"""The images: CIFAR-10 in its binary layout, or scikit-learn's handwritten digits."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import UserError
from torch import Tensor
from torch.nn import functional

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
FILES = (*TRAIN_FILES, "test_batch.bin")
SIZE = 32
# A record is one label byte, then the red, green and blue planes, row by row.
RECORD_BYTES, RECORDS = 1 + 3 * SIZE * SIZE, 10_000


@dataclass(frozen=True)
class Split:
    """Images as uint8 (N, height, width, 3) and labels as int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> "Split":
        return Split(self.images[start:stop], self.labels[start:stop])


@dataclass(frozen=True)
class Data:
    """What a run trains on and what it is judged on."""

    name: str
    train: Split
    held_out: Split
    held_out_name: str
    flips: bool


def load(directory: str | None, limit: int | None = None, validate: bool = False) -> Data:
    """Read CIFAR-10 from ``directory``, or the digits; keep ``limit`` training images.

    ``validate`` holds out the last tenth of the training images instead of the test images.
    """
    train, held_out = read_digits() if directory is None else read_cifar10(Path(directory))
    if validate:
        kept = len(train) - len(train) // 10
        train, held_out = train.part(0, kept), train.part(kept, len(train))
    return Data(
        name="digits (8x8 pixels, enlarged to 16x16)" if directory is None else "CIFAR-10",
        train=train.part(0, limit or len(train)),
        held_out=held_out,
        held_out_name="validation" if validate else "test",
        flips=directory is not None,  # a mirrored digit is no digit
    )


def read_digits() -> tuple[Split, Split]:
    """The 1,797 digits, enlarged from 8x8 to 16x16 RGB; the split is the same in every run."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    large = functional.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    everything = Split(images[order].contiguous(), torch.as_tensor(digits.target)[order].long())
    test = len(everything) // 5
    return everything.part(test, len(everything)), everything.part(0, test)


def read_cifar10(directory: Path) -> tuple[Split, Split]:
    """Read the binary layout from ``directory`` or the folder that its archive unpacks to."""
    folder = directory / FOLDER if (directory / FOLDER).is_dir() else directory
    remedy = f"give the folder of CIFAR-10's binary version, or add --download --data {directory}"
    images, labels = [], []
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise UserError(f"--data {directory}: {path} is missing; {remedy}")
        content = bytearray(path.read_bytes())
        if len(content) != (size := RECORDS * RECORD_BYTES):
            wrong = f"{len(content):,} bytes instead of {size:,}"
            raise UserError(f"--data {directory}: {path} has {wrong}; {remedy}")
        records = torch.frombuffer(content, dtype=torch.uint8).view(-1, RECORD_BYTES)
        if int(records[:, 0].max()) > 9:
            raise UserError(f"--data {directory}: {path} has a label above 9; {remedy}")
        images.append(records[:, 1:].view(-1, 3, SIZE, SIZE).permute(0, 2, 3, 1))
        labels.append(records[:, 0].long())
    everything = Split(torch.cat(images).contiguous(), torch.cat(labels))
    test = len(TRAIN_FILES) * RECORDS
    return everything.part(0, test), everything.part(test, len(everything))


def download(directory: Path) -> None:
    """Fetch and unpack CIFAR-10, unless it is there."""
    if all((directory / FOLDER / name).is_file() for name in FILES):
        return
    import pooch

    try:
        pooch.retrieve(
            URL,
            known_hash=f"sha256:{SHA256}",
            fname=URL.rpartition("/")[2],
            path=directory,
            processor=pooch.Untar([f"{FOLDER}/{name}" for name in FILES], extract_dir="."),
            progressbar=sys.stderr.isatty(),
        )
    except (OSError, ValueError) as error:  # of the network, the disk, the checksum
        raise UserError(f"--download: {error}; run the same command again") from error


class Batches:
    """The training images, on the device that trains, and batches of random crops and flips."""

    def __init__(self, data: Data, device: torch.device) -> None:
        images = data.train.images
        std_mean = [torch.std_mean(images[..., channel].float()) for channel in range(3)]
        std, mean = torch.tensor(std_mean, device=device).T
        self._mean, self._std = mean, std.clamp_min(1)
        self._size, self._pad = images.shape[1], images.shape[1] // 8
        self._images = functional.pad(images, (0, 0, *[self._pad] * 4)).to(device)
        self._labels = data.train.labels.to(device)
        self._flips = data.flips

    def epoch(
        self, seed: int, epoch: int, size: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All full batches, of each the share that is for one of several processes.

        Everything random follows from ``(seed, epoch)`` and is drawn on the CPU, so that a run
        that is resumed, or moves to another device, sees the same batches.
        """
        device, count = self._labels.device, len(self._labels)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        top, left = torch.randint(2 * self._pad + 1, (2, count, 1), generator=generator)
        rows, columns = (first + torch.arange(self._size) for first in (top, left))
        if self._flips:
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        order, rows, columns = (x.to(device) for x in (order, rows, columns))
        for first in range(0, count - size + 1, size):
            part = slice(first + rank, first + size, ranks)
            which = order[part]
            images = self._images[which[:, None, None], rows[part, :, None], columns[part, None]]
            yield self.normalise(images), self._labels[which]

    def normalise(self, images: Tensor) -> Tensor:
        """Floats (N, 3, height, width), channels last in memory."""
        normalised: Tensor = (images - self._mean) / self._std
        return normalised.permute(0, 3, 1, 2)
