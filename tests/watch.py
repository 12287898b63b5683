"""Watching what a step asks of a device."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LOOKS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where a value goes to Python or decides a shape; counts copies between devices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[str] = []

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in LOOKS, f"the step looks at a value: aten::{name}"
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            given = [a for a in args if isinstance(a, Tensor) and a.dim()]
            given += [a for a in args if isinstance(a, Tensor) and name in ("_to_copy", "copy_")]
            if any(a.device != result.device for a in given):
                self.copies.append(name)
        return result
