"""The compiled kernels: the same steps as torch's operations; and life without a compiler."""

# torch leaves backward() and its dispatch modes untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    KINDS,
    PATHS,
    QUANTIZED_KINDS,
    Kind,
    assert_consistent,
    clone_params,
    draw_gradients,
    make_params,
    same_bits,
)
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from dfw_opt import DFW, ProjectedDFW, TernaryDFW, fused, native
from dfw_opt.quantizers import ternary

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)

# One unit of work and several; rows shorter and longer than a unit, a chunk, and the lanes.
SHAPES = ((4, 6), (3, 2, 3, 3), (5,), (70, 1000), (2, 70000), (33, 31), (300, 9), (1, 1))
NO_COMPILER = {"CC": "/nonexistent/cc"}


def agree(kind: Kind, params: list[Parameter], losses: list[float], **options: Any) -> list[float]:
    """Takes the same steps with and without kernels; returns the step sizes."""
    twins = clone_params(params)
    plain = kind.make(params, foreach=False, **options)
    compiled = kind.make(twins, fused=True, **options)
    gammas = []
    for number, loss in enumerate(losses):
        draw_gradients(params, number, 0.03)
        for p, twin in zip(params, twins, strict=True):
            assert p.grad is not None
            twin.grad = p.grad.clone(memory_format=torch.preserve_format)
        plain.step(loss=loss)
        compiled.step(loss=loss)
        torch.testing.assert_close(compiled.gamma, plain.gamma, rtol=1e-4, atol=1e-6)
        assert_consistent(compiled)
        gammas.append(compiled.gamma.item())
    for p, twin in zip(params, twins, strict=True):
        assert plain.state[p].keys() == compiled.state[twin].keys()
        for key, value in plain.state[p].items():
            torch.testing.assert_close(
                compiled.state[twin][key], value, rtol=1e-5, atol=2e-6, msg=key
            )
        # A latent next to 0 may have another sign, so binary weights are compared by their size.
        torch.testing.assert_close(twin.abs(), p.abs(), rtol=1e-5, atol=2e-6)
    return gammas


class TestSameSteps:
    @ALL_KINDS
    @pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_all_settings(self, kind: Kind, weight_decay: float, momentum: float) -> None:
        losses = [1e-3, 0.3, 2.0, 10.0, 1e4, 3.0]
        gammas = agree(
            kind, make_params(SHAPES), losses, weight_decay=weight_decay, momentum=momentum
        )
        assert any(0 < gamma < 1 for gamma in gammas)
        assert 1.0 in gammas

    @ALL_KINDS
    def test_channels_last(self, kind: Kind) -> None:
        shapes = ((8, 3, 3, 3), (4, 8, 5, 5), (4, 2, 3, 3, 3), (7,))
        params = make_params(shapes)
        for p in params:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            if p.dim() in formats:
                p.data = p.data.contiguous(memory_format=formats[p.dim()])
        losses = [0.1, 1.0, 100.0]
        agree(kind, params, losses)
        assert not params[1].is_contiguous()

    @ALL_KINDS
    def test_tensor_lr(self, kind: Kind) -> None:
        agree(kind, make_params(), [0.1, 1.0, 100.0], lr=torch.tensor(0.05))

    @pytest.mark.parametrize(
        "kind", [kind for kind in QUANTIZED_KINDS if "closed" not in kind.name], ids=str
    )
    def test_hard_against_the_bounds(self, kind: Kind) -> None:
        """Long steps: most latents end on the bound, and the search sees it."""
        gammas = agree(kind, make_params(SHAPES), [5.0, 50.0, 500.0], lr=50.0)
        assert any(0 < gamma < 1 for gamma in gammas)

    @ALL_KINDS
    def test_what_kernels_cannot_do_is_done_otherwise(self, kind: Kind) -> None:
        """Other dtypes, other layouts, gradients of other layouts, beside what they can."""
        params = make_params(((4, 6), (6, 4), (3, 5), (5,)))
        params[1].data = params[1].data.t().contiguous().t()
        params[2].data = params[2].data.double()
        agree(kind, params, [0.1, 1.0, 100.0])

        (p,) = make_params(((4, 6),))
        (twin,) = clone_params([p])
        pair = kind.make([p], foreach=False), kind.make([twin], fused=True)
        draw_gradients([p], 0)
        assert p.grad is not None
        twin.grad = p.grad.t().contiguous().t()
        for optimizer in pair:
            optimizer.step(loss=1.0)
        torch.testing.assert_close(twin, p, rtol=1e-5, atol=1e-6)


class TestWhatKernelsMustNotTouch:
    """Left to torch, which does it right or says what is wrong."""

    def test_state_of_another_shape(self) -> None:
        p = Parameter(torch.randn(4, 256))
        optimizer = DFW([p], fused=True)
        p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
        p.data = torch.randn(2000, 256)
        p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="size"):
            optimizer.step(loss=1.0)

    def test_lazy_gradients(self) -> None:
        for gradient, moved in (
            (torch._neg_view(torch.ones(300)), 0.1),
            (torch._efficientzerotensor(300), 0.0),
        ):
            p = Parameter(torch.ones(300))
            p.grad = gradient
            DFW([p], fused=True, momentum=0.0).step(loss=1e6)
            torch.testing.assert_close(p.detach(), torch.full((300,), 1 + moved))

    @pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
    def test_a_parameter_twice(self) -> None:
        results = []
        for path in (PATHS["multi"], PATHS["fused"]):
            p = Parameter(torch.ones(3, 4))
            p.grad = torch.ones_like(p)
            DFW([p, p], lr=0.01, **path).step(loss=1e6)
            results.append(p.detach())
        assert torch.equal(*results)

    def test_a_changed_quantizer(self) -> None:
        """An error that says so, and no pointer to state that is not there."""
        for before, after in (("ternary", "binary"), ("binary", "ternary"), ("binary", None)):
            (p,) = make_params(((4, 6),))
            optimizer = TernaryDFW([p], quantizer=before, fused=True)
            draw_gradients([p], 0)
            optimizer.param_groups[0]["quantizer"] = after
            with pytest.raises(ValueError, match="cannot change once it has been chosen"):
                optimizer.step(loss=1.0)


@pytest.mark.parametrize("path", PATHS)
def test_a_weight_that_is_not_a_number(path: str) -> None:
    """Its own gradient is finite, yet nobody else's weights become NaN."""
    for kind in KINDS[:2]:
        p, q = make_params(((40, 6), (30, 5)))
        optimizer = kind.make([p, q], **PATHS[path])
        draw_gradients([p, q], 0, 0.01)
        with torch.no_grad():
            p[0, 0] = torch.nan
        optimizer.step(loss=0.01)
        assert p.detach().isnan().sum() == 1
        assert not q.detach().isnan().any()


def test_scales_alone_are_bounded() -> None:
    """Without a radius the latents have no bounds, but W_p and W_n still have one."""
    gammas = []
    for path in PATHS.values():
        p = Parameter(torch.tensor([[0.5, -0.5, 0.2], [0.1, 0.3, -0.4]]))
        optimizer = TernaryDFW([p], radius=None, lr=10.0, **path)
        p.grad = torch.tensor([[5.0, -1.0, 1.0], [4.0, 2.0, 0.5]])
        optimizer.step(loss=20.0)
        gammas.append(float(optimizer.gamma))
    assert gammas == pytest.approx([gammas[0]] * 3, rel=1e-4)
    assert 0 < gammas[0] < 1


@ALL_KINDS
def test_threads_do_not_change_a_bit(kind: Kind) -> None:
    """Sums are made unit by unit, whoever makes them."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(1)  # torch's own sums, at the start, depend on the number
            params = make_params(((2600, 1000), (1000, 900), (40,)))
            optimizer = kind.make(params, fused=True, weight_decay=1e-2)
            torch.set_num_threads(threads)
            for number, loss in enumerate((1.0, 30.0, 1e5)):
                draw_gradients(params, number, 0.03)
                optimizer.step(loss=loss)
            results.append([*params, *(x for p in params for x in optimizer.state[p].values())])
    finally:
        torch.set_num_threads(before)
    for one, other in itertools.pairwise(results):
        assert all(same_bits(x, y) for x, y in zip(one, other, strict=True))


class LargestResult(TorchDispatchMode):
    """Notes the most elements that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@ALL_KINDS
def test_a_step_makes_no_large_tensor(kind: Kind) -> None:
    params = make_params(((300, 300), (200, 400)))
    optimizer = kind.make(params, fused=True, weight_decay=1e-2)
    for number, loss in enumerate((1.0, 1.0, 1e4)):  # momentum is made in the first step
        draw_gradients(params, number, 0.03)
        with LargestResult() as largest:
            optimizer.step(loss=loss)
    assert 0 < largest.elements <= 8
    with LargestResult() as largest:
        torch.ones(300, 300) * 2
    assert largest.elements == 90000


def test_backward_through_a_changed_weight_is_an_error() -> None:
    """As after any other change in place: autograd is told that the parameter has a new version."""
    p = Parameter(torch.ones(4, 4))
    optimizer = DFW([p], fused=True)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step(loss=loss)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_after_a_fork() -> None:
    """Threads do not survive a fork; the child makes its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        params = make_params(((1700, 1000),))
        draw_gradients(params, 0)
        optimizer = DFW(params, fused=True)
        optimizer.step(loss=1.0)
        child = os.fork()
        if child == 0:
            optimizer.step(loss=1.0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    finally:
        torch.set_num_threads(before)
    assert status == 0


def test_small_models_do_not_wait_for_a_compiler() -> None:
    code = """
import torch, dfw_opt.native
from dfw_opt import DFW
def steps(elements):
    p = torch.nn.Parameter(torch.ones(elements))
    optimizer = DFW([p])
    p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    return dfw_opt.native.library.cache_info().misses
print(steps(1000), steps(100_000))
"""
    assert run(code).split() == ["0", "1"]


WITH_AND_WITHOUT = """
import logging, sys, warnings
warnings.simplefilter("error")
logging.basicConfig(level=logging.INFO)
import torch, dfw_opt.native
from dfw_opt import ProjectedDFW
torch.manual_seed(0)
p = torch.nn.Parameter(torch.randn(300, 300))
optimizer = ProjectedDFW([p])
for _ in range(3):
    p.grad = torch.randn(300, 300)
    optimizer.step(loss=5.0)
print(dfw_opt.native.library() is not None, float(optimizer.gamma), float(p.detach().abs().sum()))
"""


class TestCompiler:
    def test_without_one(self, tmp_path: Path) -> None:
        """Slower, but right, and without a warning; the reason is in the log, once."""
        cache = {"XDG_CACHE_HOME": str(tmp_path)}
        there, gamma, total = run(WITH_AND_WITHOUT, **cache).split()
        cache = {"XDG_CACHE_HOME": str(tmp_path / "other")}
        result = run_process(WITH_AND_WITHOUT, **cache, **NO_COMPILER)
        absent, other_gamma, other_total = result.stdout.split()
        assert (there, absent) == ("True", "False")
        assert float(gamma) == pytest.approx(float(other_gamma), rel=1e-5)
        assert float(total) == pytest.approx(float(other_total), rel=1e-5)
        assert result.stderr.count("no compiled steps") == 1

    @pytest.mark.parametrize("script", ["exit 1", "sleep 5"])
    def test_broken_one(self, tmp_path: Path, script: str) -> None:
        compiler = tmp_path / "cc"
        compiler.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        compiler.chmod(0o755)
        code = f"import dfw_opt.native as n\nn._TIMEOUT = 1\n{WITH_AND_WITHOUT}"
        result = run_process(code, CC=str(compiler), XDG_CACHE_HOME=str(tmp_path))
        assert result.stdout.split()[0] == "False"

    def test_compiles_once(self, tmp_path: Path) -> None:
        """And the second process needs no compiler any more, unless another one is asked for."""
        count = tmp_path / "count"
        compiler = tmp_path / "cc"
        compiler.write_text(f'#!/bin/sh\necho x >> "{count}"\nexec cc "$@"\n', encoding="utf-8")
        compiler.chmod(0o755)
        for _ in range(2):
            run(WITH_AND_WITHOUT, CC=str(compiler), XDG_CACHE_HOME=str(tmp_path))
        assert count.read_text(encoding="utf-8").split() == ["x"]
        (library,) = (tmp_path / "dfw_opt").iterdir()
        assert library.suffix == ".so"

    def test_many_processes_at_once(self, tmp_path: Path) -> None:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", WITH_AND_WITHOUT],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for _ in range(3)
        ]
        results = [process.communicate()[0] for process in processes]
        assert results[0].startswith("True")
        assert len(set(results)) == 1

    @pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
    def test_unwritable_cache(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        assert run(WITH_AND_WITHOUT, XDG_CACHE_HOME=str(tmp_path)).startswith("True")

    def test_cache_that_others_can_write_to(self, tmp_path: Path) -> None:
        """Is not trusted: whoever writes there would run code here."""
        folder = tmp_path / "dfw_opt"
        folder.mkdir()
        folder.chmod(0o777)
        assert run(WITH_AND_WITHOUT, XDG_CACHE_HOME=str(tmp_path)).startswith("True")
        assert not list(folder.iterdir())

    def test_in_this_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        load = native.library.__wrapped__
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert load() is not None
        (made,) = (tmp_path / "dfw_opt").iterdir()
        before = made.stat().st_mtime_ns
        assert load() is not None
        assert made.stat().st_mtime_ns == before
        monkeypatch.setenv("CC", "false")
        assert load() is None
        monkeypatch.delenv("CC")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert load() is None
        (tmp_path / "dfw_opt").chmod(0o777)
        assert native._cache() is None

    @pytest.mark.parametrize("length", [0, 10, 5000, -1])
    def test_damaged_library(
        self, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """To load half a library would be the end of the process; it is made again."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert native.library.__wrapped__() is not None
        (made,) = (tmp_path / "dfw_opt").iterdir()
        whole = made.read_bytes()
        damaged = tmp_path / "damaged"  # another file: this process has the first one loaded
        damaged.write_bytes(whole[:length])
        damaged.replace(made)
        assert native.library.__wrapped__() is not None
        assert made.read_bytes() == whole
        made.chmod(0o666)
        assert not native._sound(made)

    def test_no_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", homeless)
        assert native.library.__wrapped__() is not None

    def test_compiler_with_arguments(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "cc '-DWITH SPACE=1'")
        assert native.library.__wrapped__() is not None


def test_where_new_tensors_go_by_default() -> None:
    p, twin = (Parameter(torch.linspace(-1, 1, 6).view(2, 3)) for _ in range(2))
    optimizers = ProjectedDFW([p], fused=True), ProjectedDFW([twin], fused=False)
    for q, optimizer in zip((p, twin), optimizers, strict=True):
        q.grad = torch.ones_like(q)
        with torch.device("meta"):
            optimizer.step(loss=0.1)
    torch.testing.assert_close(p, twin)


def test_foreach_and_fused_together() -> None:
    with pytest.raises(ValueError, match="foreach=True and fused=True"):
        DFW(make_params(), foreach=True, fused=True)


def test_the_structures_are_those_of_c() -> None:
    """Sizes and places, as the compiler sees them."""
    library = native.library()
    assert library is not None
    layout = (ctypes.c_int64 * 8)()
    library.dfw_layout(layout)
    offsets = fused._OFFSETS
    assert list(layout) == [
        fused._TENSOR.size,
        ctypes.sizeof(native.Settings),
        offsets["unit"],
        offsets["scale_pos"],
        offsets["momentum_buffer"],
        offsets["scale_pos_momentum_buffer"],
        fused._TENSOR.size - 5 * 8,
        fused._TENSOR.size - 8,
    ]
    assert offsets["scale_neg"] == offsets["scale_pos"] + 8
    assert fused._FLOAT.size == fused._TENSOR.size
    number = fused._FLOAT.unpack(fused._FLOAT.pack(1, 2, 3, 4, 5, 6))[-1]
    (found,) = fused._POINTER.unpack_from(
        fused._FLOAT.pack(1, 2, 3, 4, 5, 6), offsets["momentum_buffer"]
    )
    assert number == found == 6


def run_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def run(code: str, **environment: str) -> str:
    return run_process(code, **environment).stdout


def test_a_group_that_makes_the_model_large() -> None:
    p = Parameter(torch.ones(10))
    q = Parameter(torch.ones(fused.LEAST_ELEMENTS))
    optimizer = DFW([p])
    p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    assert optimizer._kernels() is None
    optimizer.add_param_group({"params": [q]})
    assert optimizer._kernels() is native.library()


def test_no_kernels_beside_an_accelerator() -> None:
    """Whose step may turn out not to count, when the kernels have moved the rest already."""
    params = [Parameter(torch.ones(3)), Parameter(torch.empty(3, device="meta"))]
    for each in (params, params[::-1]):
        assert DFW(each, fused=True)._kernels() is None
    assert DFW(params[:1], fused=True)._kernels() is native.library()


def test_scales_from_below_their_bound() -> None:
    """As a checkpoint may hold them: getting to the bound counts in the search."""
    gammas = []
    for path in PATHS.values():
        (p,) = make_params(((4, 6),))
        optimizer = TernaryDFW([p], lr=0.1, radius=2.0, **path)
        optimizer.state[p]["scale_pos"].fill_(-0.5)
        zones = optimizer.state[p]["latent"] > optimizer.state[p]["delta"]
        p.grad = -1.0 * zones
        optimizer.step(loss=0.05)
        assert float(optimizer.state[p]["scale_pos"]) >= ternary.SCALE_MIN
        gammas.append(float(optimizer.gamma))
    assert gammas == pytest.approx([gammas[0]] * 3, rel=1e-4)


@ALL_KINDS
@pytest.mark.parametrize(
    ("before", "move"),
    [
        pytest.param(
            torch.float32, lambda p: p.contiguous(memory_format=torch.channels_last), id="layout"
        ),
        pytest.param(torch.float64, lambda p: p.float(), id="dtype"),
    ],
)
def test_a_moved_model(kind: Kind, before: torch.dtype, move: Callable[[Tensor], Tensor]) -> None:
    """The state is not like the parameters any more: no kernel may read it as if it were."""
    params = make_params(((4, 3, 3, 3), (2, 4, 3, 3)), before)
    twins = clone_params(params)
    optimizers = kind.make(params, foreach=False), kind.make(twins, fused=True)
    for number in range(4):
        if number == 2:
            for p in (*params, *twins):
                p.grad, p.data = None, move(p.data)
        draw_gradients(params, number, 0.03)
        for p, twin in zip(params, twins, strict=True):
            assert p.grad is not None
            p.grad = torch.empty_like(p).copy_(p.grad)
            twin.grad = p.grad.clone(memory_format=torch.preserve_format)
            assert twin.grad.stride() == twin.stride()
        for optimizer in optimizers:
            optimizer.step(loss=0.1)
        assert_consistent(optimizers[1])
    for p, twin in zip(params, twins, strict=True):
        for key, value in optimizers[0].state[p].items():
            torch.testing.assert_close(
                optimizers[1].state[twin][key], value, rtol=1e-5, atol=2e-6, msg=key
            )
        torch.testing.assert_close(twin.abs(), p.abs(), rtol=1e-5, atol=2e-6)
