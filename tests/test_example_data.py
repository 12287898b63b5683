"""Reading the images, and cutting batches out of them."""

from pathlib import Path

import pytest
import torch
from resnet20 import data
from resnet20.augment import PAD, Augmenter
from resnet20.data import Data, Split
from resnet20.errors import UserError
from torch import Tensor

CPU = torch.device("cpu")


def write_cifar10(folder: Path, records: int) -> dict[str, Tensor]:
    """Six files in the official layout, with random content."""
    folder.mkdir(parents=True)
    contents = {}
    for i, name in enumerate(data.TRAIN_FILES + data.TEST_FILES):
        generator = torch.Generator().manual_seed(i)
        content = torch.randint(256, (records, data.RECORD_BYTES), generator=generator)
        content[:, 0] %= data.CLASSES
        contents[name] = content.to(torch.uint8)
        (folder / name).write_bytes(bytes(contents[name].flatten().tolist()))
    return contents


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(data, "RECORDS_PER_FILE", 10)
    return 10


@pytest.mark.parametrize("inside", [True, False], ids=["folder itself", "folder above"])
def test_reads_the_binary_layout(tmp_path: Path, small_files: int, inside: bool) -> None:
    folder = tmp_path / data.FOLDER
    contents = write_cifar10(folder, small_files)
    loaded = data.load(folder if inside else tmp_path)
    assert loaded.name == "CIFAR-10"
    assert loaded.flips
    assert loaded.held_out_name == "test"
    assert loaded.train.images.shape == (50, 32, 32, 3)
    assert loaded.held_out.images.shape == (10, 32, 32, 3)
    third = contents["data_batch_3.bin"]
    assert torch.equal(loaded.train.labels[20:30], third[:, 0].long())
    # Row 5, column 7 of the green plane of the second record.
    assert loaded.train.images[21, 5, 7, 1] == third[1, 1 + 32 * 32 + 5 * 32 + 7]
    assert torch.equal(loaded.held_out.labels, contents["test_batch.bin"][:, 0].long())


def test_limit_and_validate(tmp_path: Path, small_files: int) -> None:
    write_cifar10(tmp_path / "c", small_files)
    everything = data.load(tmp_path / "c")
    tuning = data.load(tmp_path / "c", limit=12, validate=True)
    assert tuning.held_out_name == "validation"
    assert torch.equal(tuning.held_out.images, everything.train.images[45:])
    assert torch.equal(tuning.train.labels, everything.train.labels[:12])
    assert len(data.load(tmp_path / "c", validate=True).train) == 45


def test_missing_truncated_and_damaged_files(tmp_path: Path, small_files: int) -> None:
    folder = tmp_path / data.FOLDER
    write_cifar10(folder, small_files)
    bad = folder / "data_batch_4.bin"
    content = bad.read_bytes()

    bad.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"data_batch_4\.bin has 30,729 bytes instead of 30,730"):
        data.load(tmp_path)
    bad.write_bytes(b"\x0a" + content[1:])
    with pytest.raises(UserError, match=r"data_batch_4\.bin is damaged"):
        data.load(tmp_path)
    bad.unlink()
    with pytest.raises(UserError, match=r"data_batch_4\.bin is missing; .* --download"):
        data.load(tmp_path)
    with pytest.raises(UserError, match="is missing"):
        data.load(tmp_path / "nowhere")


def test_digits() -> None:
    digits = data.load(None)
    assert not digits.flips
    assert len(digits.train) + len(digits.held_out) == 1797
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.shape[1:] == (32, 32, 3)
    assert int(digits.train.images.max()) == 255
    assert set(digits.train.labels.tolist()) == set(digits.held_out.labels.tolist()) == {*range(10)}
    again = data.load(None)
    assert again.digest == digits.digest
    assert data.load(None, limit=100).digest != digits.digest
    # No image is in both halves.
    train = {bytes(image.flatten().tolist()) for image in digits.train.images[:, ::4, ::4, 0]}
    test = {bytes(image.flatten().tolist()) for image in digits.held_out.images[:, ::4, ::4, 0]}
    assert not train & test


def numbered(count: int, flips: bool) -> Data:
    """Images in which every pixel differs from all others of its image, and no pixel is 0."""
    pixels = torch.arange(32 * 32)
    channels = (pixels % 251 + 1, pixels // 251 + 1)
    numbers = (torch.full_like(pixels, i + 1) for i in range(count))
    images = torch.stack([torch.stack((*channels, number), -1) for number in numbers])
    split = Split(images.view(count, 32, 32, 3).to(torch.uint8), torch.arange(count) % 10)
    return Data("numbers", split, split.part(0, 2), "test", flips)


def original(augmenter: Augmenter, images: Tensor) -> Tensor:
    """Undo the normalisation, back to uint8 (N, 32, 32, 3)."""
    channels = images / augmenter._scale + augmenter._mean
    return channels.round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize("flips", [True, False])
def test_every_crop_is_one_of_the_padded_image(flips: bool) -> None:
    numbers = numbered(60, flips)
    augmenter = Augmenter(numbers, CPU)
    seen: set[int] = set()
    shifts: set[tuple[int, int]] = set()
    flips_of_batches: list[list[bool]] = []
    for images, labels in augmenter.epoch(seed=1, epoch=0, batch_size=16):
        assert images.shape == (16, 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        flips_of_batches.append([])
        for crop, label in zip(original(augmenter, images), labels, strict=True):
            index = int(crop[16, 16, 2]) - 1
            seen.add(index)
            assert label == index % 10
            row, column, mirrored = _find(numbers.train.images[index], crop)
            flips_of_batches[-1].append(mirrored)
            shifts.add((row, column))
    assert len(seen) == 48  # three batches of 16 different images; the 12 left over wait
    flipped = sum(sum(batch) for batch in flips_of_batches)
    assert (10 < flipped < 38) if flips else flipped == 0
    assert (flips_of_batches[0] != flips_of_batches[1]) == flips
    assert len(shifts) > 25
    assert {row for row, _ in shifts} == {*range(2 * PAD + 1)}


def _find(image: Tensor, crop: Tensor) -> tuple[int, int, bool]:
    padded = torch.zeros(32 + 2 * PAD, 32 + 2 * PAD, 3, dtype=torch.uint8)
    padded[PAD:-PAD, PAD:-PAD] = image
    for row in range(2 * PAD + 1):
        for column in range(2 * PAD + 1):
            window = padded[row : row + 32, column : column + 32]
            for mirrored in (False, True):
                if torch.equal(crop, window.flip(1) if mirrored else window):
                    return row, column, mirrored
    raise AssertionError("not a crop of the image")


def test_batches_follow_from_seed_and_epoch_alone() -> None:
    numbers = numbered(40, True)

    def batches(seed: int, epoch: int) -> Tensor:
        torch.rand(3)  # whatever else is drawn has no part in it
        return torch.cat([x for x, _ in Augmenter(numbers, CPU).epoch(seed, epoch, 20)])

    assert torch.equal(batches(0, 3), batches(0, 3))
    assert not torch.equal(batches(0, 3), batches(0, 4))
    assert not torch.equal(batches(0, 3), batches(1, 3))


def test_normalised_training_images_have_mean_0_and_deviation_1() -> None:
    images = torch.randint(256, (50, 32, 32, 3), dtype=torch.uint8) // torch.tensor(
        [1, 2, 4], dtype=torch.uint8
    )
    split = Split(images, torch.zeros(50, dtype=torch.int64))
    augmenter = Augmenter(Data("noise", split, split, "test", True), CPU)
    normalised = augmenter.normalise(images)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        normalised.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0
    )
