"""Progress bars for a person at a terminal, and nothing for a log file."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from .meter import Meter

# Reading the meter waits for the device, so it is read now and then, not at every step.
_SECONDS_BETWEEN_READINGS = 0.5


def at_terminal() -> bool:
    """Whether someone is watching."""
    return sys.stderr.isatty()


class EpochBar:
    """The bar of one epoch, with the means so far of loss, accuracy and γ."""

    def __init__(self, title: str, steps: int, shown: bool = True) -> None:
        disable = not (shown and at_terminal())
        self._bar: Any = tqdm(
            total=steps, desc=title, leave=False, disable=disable, dynamic_ncols=True
        )
        self._next_reading = 0.0

    def advance(self, meter: Meter) -> None:
        """Count one step."""
        self._bar.update()
        if not self._bar.disable and time.monotonic() >= self._next_reading:
            loss, accuracy, gamma = meter.read()
            text = f"loss {loss:.3f}, accuracy {100 * accuracy:.1f} %"
            self._bar.set_postfix_str(text if gamma != gamma else f"{text}, γ {gamma:.2f}")
            self._next_reading = time.monotonic() + _SECONDS_BETWEEN_READINGS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()


class DownloadBar:
    """The bar of a download; called with the bytes that are there and the bytes in all."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=total,
                desc=self._title,
                unit="B",
                unit_scale=True,
                disable=not at_terminal(),
                dynamic_ncols=True,
            )
        self._bar.update(done - self._bar.n if not self._bar.disable else 0)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()
