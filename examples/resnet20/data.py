"""The images: CIFAR-10 in its official binary layout, or scikit-learn's handwritten digits."""

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from .errors import UserError

SIZE = 32
CLASSES = 10
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
# A record is one label byte, then the red, green and blue planes, row by row.
RECORD_BYTES = 1 + 3 * SIZE * SIZE
RECORDS_PER_FILE = 10_000

_SPLIT_SEED = 0
_DIGITS_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Split:
    """Images as uint8 (N, 32, 32, 3) and labels as int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> "Split":
        """The images from ``start`` to ``stop``."""
        return Split(self.images[start:stop], self.labels[start:stop])


@dataclass(frozen=True)
class Data:
    """What a run trains on and what it is judged on."""

    name: str
    train: Split
    held_out: Split
    held_out_name: str
    flips: bool

    @cached_property
    def digest(self) -> int:
        """A checksum, so that a run is never resumed on other images."""
        value = 0
        for split in (self.train, self.held_out):
            for tensor in (split.images, split.labels):
                value = zlib.crc32(tensor.contiguous().numpy().tobytes(), value)
        return value


def load(directory: Path | None, limit: int | None = None, validate: bool = False) -> Data:
    """Read the images.

    Args:
        directory: where CIFAR-10 is; ``None`` for the digits.
        limit: keep only so many training images.
        validate: judge on the last tenth of the training images (5,000 of CIFAR-10), which are
            then not trained on, instead of on the test images.
    """
    if directory is None:
        name, flips = "handwritten digits", False  # a mirrored digit is no digit
        train, held_out = read_digits()
    else:
        name, flips = "CIFAR-10", True
        train, held_out = read_cifar10(directory)
    if validate:
        kept = len(train) - len(train) // 10
        train, held_out = train.part(0, kept), train.part(kept, len(train))
    if limit is not None:
        train = train.part(0, limit)
    return Data(name, train, held_out, "validation" if validate else "test", flips)


def read_cifar10(directory: Path) -> tuple[Split, Split]:
    """Read the binary layout from ``directory`` or the folder that its archive unpacks to."""
    folder = find_cifar10(directory)
    return _read_split(folder, TRAIN_FILES), _read_split(folder, TEST_FILES)


def find_cifar10(directory: Path) -> Path:
    """The folder with all six files in their full size, or an error that names the bad one."""
    folder = directory / FOLDER if (directory / FOLDER).is_dir() else directory
    remedy = f"give the folder of CIFAR-10's binary version, or add --download --data {directory}"
    wanted = RECORDS_PER_FILE * RECORD_BYTES
    for name in TRAIN_FILES + TEST_FILES:
        path = folder / name
        if not path.is_file():
            raise UserError(f"--data: {path} is missing; {remedy}")
        if path.stat().st_size != wanted:
            raise UserError(
                f"--data: {path} has {path.stat().st_size:,} bytes instead of {wanted:,}; {remedy}"
            )
    return folder


def _read_split(folder: Path, names: tuple[str, ...]) -> Split:
    images, labels = [], []
    for name in names:
        try:
            content = bytearray((folder / name).read_bytes())
        except OSError as error:
            raise UserError(f"--data: cannot read {folder / name}: {error.strerror}") from error
        records = torch.frombuffer(content, dtype=torch.uint8).view(-1, RECORD_BYTES)
        if int(records[:, 0].max()) >= CLASSES:
            raise UserError(
                f"--data: {folder / name} is damaged (a label above {CLASSES - 1}); "
                "get CIFAR-10's binary version anew with --download"
            )
        labels.append(records[:, 0].long())
        images.append(records[:, 1:].view(-1, 3, SIZE, SIZE).permute(0, 2, 3, 1))
    return Split(torch.cat(images).contiguous(), torch.cat(labels))


def read_digits() -> tuple[Split, Split]:
    """The 1,797 digits, upsampled to 32x32 RGB; the split is the same in every run."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)
    large = functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    test = int(len(labels) * _DIGITS_TEST_SHARE)
    images, labels = images[order].contiguous(), labels[order]
    return (
        Split(images[test:].contiguous(), labels[test:]),
        Split(images[:test].contiguous(), labels[:test]),
    )
