"""The trained network as a packed file, read back to see that it is the same network."""

import io
from pathlib import Path

import torch
from torch import nn

from dfw_opt import PackedFileError, load_packed, save_packed

from . import files, nets
from .errors import UserError
from .straight_through import plain_state
from .training import Run


def check(path: Path, finished: bool) -> None:
    """See that ``path`` can be written, before any work is done.

    What is there is never overwritten. Only a finished run that is resumed may find its own file.
    """
    if path.is_dir() or (path.exists() and not finished):
        raise UserError(f"{path} already exists; remove it or choose another --export")
    files.make_directory(path.parent, "--export")
    files.clear_leftovers(path.parent, [path.name])


def export(run: Run, path: Path) -> str:
    """Write the network of ``run`` to ``path``, read it back, and say how good and how large it is.

    If there is an average, it is that. It is read into a float network with other weights, which
    then has to be equal.
    """
    settings = run.settings
    model = nets.build(settings.net, settings.shortcut, settings.seed, settings.arch)
    model.load_state_dict(plain_state(run.result))
    if not path.exists():
        save_packed(model, path)
    reloaded = nets.build(settings.net, settings.shortcut, settings.seed + 1, settings.arch)
    try:
        load_packed(reloaded, path)
        same = _same(model, reloaded)
    except PackedFileError:
        same = False
    if not same:
        raise UserError(f"{path} is not the network of this run; choose another --export")
    _, before = run.evaluate(run.result)
    _, after = run.evaluate(reloaded.to(run.device))
    if before != after:
        raise UserError(
            f"the network read back from {path} has another accuracy, {after} instead of {before}; "
            "do not use it, and please report this"
        )
    plain = io.BytesIO()
    torch.save(model.state_dict(), plain)
    size = path.stat().st_size
    return (
        f"exported {path}: {size:,} bytes, {plain.tell() / size:.1f} times smaller than with "
        f"torch.save; {run.data.held_out_name} accuracy after reloading {100 * after:.2f} %"
    )


def _same(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)
