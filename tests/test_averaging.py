"""``AveragedModel`` against a literal loop over what the optimizer holds, in float64 numpy.

Averaged are the latents in the unit of the weights, c·u, the scales c·W and the float parameters;
the average is quantized, never relaxed, whatever happens between two updates.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import everything, fingerprint, same_bits, to_numpy
from reference import Array
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, swa_utils

import dfw_opt
from dfw_opt import DFW, AveragedModel, ProjectedDFW, TernaryDFW, param_groups

multi_swa, multi_ema = swa_utils.get_swa_multi_avg_fn(), swa_utils.get_ema_multi_avg_fn(0.7)
# How much of a new value goes into each, by how many values there were before it.
AVERAGES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "default": ({}, lambda t: 10 / (t + 10)),
    "swa": ({"multi_avg_fn": multi_swa}, lambda t: 1 / (t + 1)),
    "swa fn": ({"avg_fn": swa_utils.get_swa_avg_fn()}, lambda t: 1 / (t + 1)),
    "ema": ({"multi_avg_fn": multi_ema}, lambda t: 0.3),
}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "float": (DFW, {}),
    "box": (ProjectedDFW, {"quantizer": None, "radius": 0.3}),
    "binary": (ProjectedDFW, {"radius": 0.8}),
    "uniform": (ProjectedDFW, {"quantizer": "uniform", "bits": 3}),
    "ternary": (TernaryDFW, {"threshold": 0.2}),
}
QUANTIZED = ("binary", "uniform", "ternary")
kinds = pytest.mark.parametrize("kind", OPTIMIZERS)


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The second convolution and the first Linear layer are quantized."""
    torch.manual_seed(seed)
    first, second = nn.Conv2d(1, 4, 2, bias=False), nn.Conv2d(4, 6, 2)
    rest = (nn.Flatten(), nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 3))
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.Tanh(), second, *rest).to(dtype)


def literal_weights(v: dict[str, Array], group: dict[str, Any]) -> Array:
    """Q of a latent in the unit of the weights."""
    if (u := v.get("latent")) is None:
        return v[""]
    if group["quantizer"] == "ternary":
        delta = group["threshold"] * np.abs(u).max()
        return np.asarray((u > delta) * v["scale_pos"] - (u < -delta) * v["scale_neg"])
    rest: Any = tuple(range(1, u.ndim))
    if group["quantizer"] == "binary":
        return np.asarray(np.where(u >= 0, 1.0, -1.0) * np.abs(u).mean(rest, keepdims=True))
    space = np.abs(u).max(rest, keepdims=True) / (2 ** (group["bits"] - 1) - 1)
    return np.asarray(np.round(u / space) * space)


class Training:
    """A model, its optimizer, their average, and the loop that says what that is to be."""

    def __init__(
        self, kind: str, average: str = "default", model: Any = None, groups: Any = None, **own: Any
    ) -> None:
        optimizer, settings = OPTIMIZERS[kind]
        self.model: nn.Module = model or make_model()
        groups = self.model.parameters() if kind == "box" else groups or param_groups(self.model)
        self.optimizer: Any = optimizer(groups, **{"lr": 0.5, **settings, **own})
        functions, self.share = AVERAGES[average]
        self.averaged = AveragedModel(self.model, self.optimizer, **functions)
        self.means: dict[tuple[str, str], Array] = {}

    def fit(self, seed: int, model: Any = None) -> None:
        x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        x = x.to(next(self.model.parameters()).dtype)
        self.model.zero_grad()
        loss = nn.functional.cross_entropy((model or self.model)(x).float(), torch.arange(8) % 3)
        loss.backward()
        self.optimizer.step(loss=loss)

    def go_on(self, *seeds: int, model: Any = None) -> None:
        """Steps, with an update after each."""
        for seed in seeds:
            self.fit(seed, model)
            self.averaged.update_parameters(model or self.model)

    def check(self, rtol: float = 1e-13) -> dict[str, Array]:
        """After each update: takes the values into the loop, and returns what it has."""
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        expected = {name: to_numpy(x) for name, x in self.model.state_dict().items()}
        buffers = self.model.named_buffers() if self.averaged.use_buffers else ()
        for name, p in (*self.model.named_parameters(), *buffers):
            state, v = self.optimizer.state.get(p, {}), {"": to_numpy(p)}
            if "latent" in state:
                keys = state.keys() & {"latent", "scale_pos", "scale_neg"}
                v = {key: float(state["unit"]) * to_numpy(state[key]) for key in keys}
            for key, value in v.items():
                old = self.means.get((name, key), value)  # it begins with the first that there is
                share = self.share(int(self.averaged.n_averaged) - 1)
                v[key] = self.means[name, key] = old + share * (value - old)
            expected[name] = literal_weights(v, groups.get(p, {}))
        for name, mine in self.averaged.module.state_dict().items():
            if "batches" not in name:  # of which torch's functions make whole numbers
                np.testing.assert_allclose(to_numpy(mine), expected[name], rtol, rtol, err_msg=name)
        return expected

    def bits(self) -> Any:
        return fingerprint([self.averaged.state_dict(), everything(self.optimizer)])


@kinds
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(
    ("dtype", "rtol"),  # a few roundings of the averages, and one of the weights
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-8)],
)
def test_literal(kind: str, average: str, dtype: torch.dtype, rtol: float) -> None:
    """From the first update on, where it is the model itself; nothing else is touched."""
    run = Training(kind, average, make_model(dtype=dtype))
    # torch's function for "swa" cannot average whole numbers; buffers in half precision stay that.
    run.averaged.use_buffers = average != "swa" and dtype != torch.bfloat16
    for number in range(5):
        run.fit(number)
        before = everything(run.optimizer), fingerprint(torch.get_rng_state())
        run.averaged.update_parameters(run.model)
        assert (everything(run.optimizer), fingerprint(torch.get_rng_state())) == before
        expected = run.check(rtol)
        now = run.model.named_parameters()
        same = all(np.allclose(to_numpy(p), expected[name], rtol, rtol) for name, p in now)
        assert same == (number == 0)


def test_default_is_about_the_last_tenth() -> None:
    """The weights of T values, by averaging unit vectors: binomials, which sum to 1."""
    T = 200
    model = nn.Linear(T, 1, bias=False).double()
    optimizer = DFW(model.parameters())
    averaged = AveragedModel(model, optimizer)
    for row in torch.eye(T, dtype=torch.float64).split(1):
        model.weight.data = row
        averaged.update_parameters(model)
    weights = to_numpy(averaged.module.get_parameter("weight"))[0]
    expected = [math.comb(i + 9, 9) / math.comb(T + 9, 10) for i in range(T)]
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert T / 12 < sum(weights * np.arange(T)[::-1]) < T / 10  # the mean age


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    """An update moves the average by a hundredth of the least difference of two weights."""
    run = Training("binary", model=make_model(dtype=dtype))
    run.averaged.multi_avg_fn = swa_utils.get_ema_multi_avg_fn(0.99)
    run.averaged.update_parameters(run.model)
    bias = run.model.get_parameter("3.bias").detach()
    bias.copy_(torch.nextafter(bias, torch.full_like(bias, 9)))
    for number in range(100):
        found = run.averaged.module.get_parameter("3.bias")
        assert same_bits(found, bias) == (number >= 69)  # 0.99^69 < 1/2 < 0.99^68
        run.averaged.update_parameters(run.model)


def load_units(_: Tensor, optimizer: Any) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values |= {key: 3 * value for key, value in values.items() if key == "unit"}
    optimizer.load_state_dict(state)


EVENTS: dict[str, Callable[[Tensor, Any], Any]] = {
    # Latents near the bounds, so that the next step doubles their unit.
    "unit doubles": lambda p, optimizer: optimizer.state[p]["latent"].sign_().mul_(0.8),
    "other units": load_units,
    "unfreeze": lambda p, _: p.requires_grad_(True),
    "add a group": lambda p, o: o.add_param_group({"params": [p], "param_names": ["late"]}),
    "relax": lambda _, optimizer: optimizer.relax(0.7),
    "freeze": lambda p, _: p.requires_grad_(False),
    "skip": lambda _, optimizer: optimizer.step(loss=math.nan),
}
CASES = [(kind, event) for kind in OPTIMIZERS for event in ("freeze", "skip")]
CASES += [(kind, event) for kind in QUANTIZED for event in [*EVENTS][1:5]]
CASES += [(kind, "unit doubles") for kind in ("binary", "uniform")]


@pytest.mark.parametrize(("kind", "event"), CASES)
@pytest.mark.parametrize(("norm", "average"), [("spectral", "default"), ("euclidean", "ema")])
def test_between_updates(kind: str, event: str, norm: str, average: str) -> None:
    model = make_model()
    late = model.get_parameter("5.weight").requires_grad_(event != "unfreeze")
    groups = param_groups(model)
    if event == "add a group":
        groups[0] |= {key: groups[0][key][:1] for key in ("params", "param_names")}
    run = Training(kind, average, model, groups, norm=norm)
    unit = float(run.optimizer.state.get(late, {}).get("unit", math.nan))
    for number in range(5):
        if number == 2:
            EVENTS[event](late, run.optimizer)
        run.go_on(number)
        run.check()
    if unit > 0:
        ratio = {"unit doubles": 2, "other units": 3}.get(event, 1)
        assert run.optimizer.state[late]["unit"] == ratio * unit


@pytest.mark.parametrize(("kind", "average"), [*zip(OPTIMIZERS, [*AVERAGES, "ema"], strict=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit(kind: str, average: str, dtype: torch.dtype) -> None:
    """Saved, and loaded into fresh objects, without pickled code."""
    runs = [Training(kind, average, make_model(seed, dtype)) for seed in range(2)]
    parts = [(run.model, run.optimizer, run.averaged) for run in runs]
    runs[0].go_on(0, 1, 2)
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in parts[0]], saved)
    saved.seek(0)
    for part, state in zip(parts[1], torch.load(saved, weights_only=True), strict=True):
        part.load_state_dict(state)
    for run in runs:
        run.go_on(3, 4, 5)
    assert runs[0].bits() == runs[1].bits()


@kinds
def test_inference_mode(kind: str) -> None:
    """Made and updated there, it is the same, and can be trained and updated outside."""
    ends = []
    for inference in (False, True):
        late = (model := make_model()).get_parameter("5.weight").requires_grad_(False)
        run = Training(kind, model=model)
        with torch.inference_mode(inference):
            run.averaged = AveragedModel(run.model, run.optimizer)
        late.requires_grad_(True)
        for number in range(4):
            run.fit(number)
            with torch.inference_mode(inference and number % 2 == 0):
                run.averaged.update_parameters(run.model)
        run.averaged(torch.ones(4, 1, 4, 4, dtype=torch.float64)).sum().backward()
        ends.append((run.bits(), fingerprint([p.grad for p in run.averaged.module.parameters()])))
    assert ends[0] == ends[1]


def test_wrapped_models(tmp_path: Path) -> None:
    """A wrapper has the same parameters, so it is the same model."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        run = Training("binary")
        compiled = torch.compile(run.model, backend="eager")
        for number, wrapper in enumerate((DistributedDataParallel(run.model), compiled)):
            run.go_on(number, model=wrapper)
            run.check()
    finally:
        dist.destroy_process_group()


def test_what_this_optimizer_does_not_train() -> None:
    """Parameters of another optimizer are averaged, whole numbers copied."""
    model = make_model()
    table = nn.Parameter(torch.arange(4).to(torch.int8), False)
    model.get_submodule("7").register_parameter("table", table)
    quantized, floats = param_groups(model)
    run, sgd = Training("binary", "default", model, [quantized]), SGD(floats["params"][:-1], lr=0.5)
    for number in range(4):
        run.go_on(number)
        run.means.pop(("7.table", ""), None)  # so that the loop begins anew
        run.check()
        sgd.step()
        table.data += 1


def test_update_bn() -> None:
    """The statistics become those of the averaged network's inputs; nothing else moves."""
    (run := Training("binary")).go_on(0, 1, 2)
    averaged = run.averaged
    untouched = [*run.model.state_dict().values(), *averaged.parameters()]
    before = fingerprint(untouched), everything(run.optimizer)
    batches = torch.randn(3, 8, 1, 4, 4, dtype=torch.float64)
    swa_utils.update_bn([(batch,) for batch in batches], averaged)
    assert (fingerprint(untouched), everything(run.optimizer)) == before
    seen = torch.stack([averaged.module.get_submodule("0")(x).detach() for x in batches])
    mean, variance = (averaged.module.get_buffer(f"1.running_{key}") for key in ("mean", "var"))
    torch.testing.assert_close(mean, seen.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(variance, seen.transpose(1, 2).flatten(2).var(2).mean(0))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_packed(kind: str, tmp_path: Path) -> None:
    """The average of a quantized net takes as few bits, and comes back into the float model."""
    path, layers = tmp_path / "file", (nn.Linear(16, 96), nn.Linear(96, 96), nn.Linear(96, 3))
    (run := Training(kind, model=nn.Sequential(nn.Flatten(), *layers))).go_on(0, 1, 2)
    dfw_opt.save_packed(run.averaged.module, path)
    floats = sum(p.numel() for p in run.model.parameters()) - 96 * 96 + 96
    bits = 32 * floats + {"binary": 1, "uniform": 3, "ternary": 2}[kind] * 96 * 96
    assert path.stat().st_size < bits / 8 + 2000
    twin = dfw_opt.load_packed(copy.deepcopy(run.model), path)
    assert fingerprint(twin.state_dict()) == fingerprint(run.averaged.module.state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "optimizer gone"])
def test_without_its_optimizer(way: str) -> None:
    """As good as it was, and says why it takes nothing in."""
    run = Training("binary")
    run.go_on(0)
    twin, before = run.averaged, fingerprint(run.averaged.state_dict())
    if way == "optimizer gone":
        del run.optimizer
    else:
        twin = copy.deepcopy(twin) if way == "deepcopy" else pickle.loads(pickle.dumps(twin))
    with pytest.raises(RuntimeError, match=r"is no more, or this is a copy: make a new Averaged"):
        twin.update_parameters(run.model)
    assert fingerprint(twin.state_dict()) == before


@pytest.mark.parametrize("other", [SGD(make_model().parameters(), lr=0.1), None, make_model()])
def test_refuses_another_optimizer(other: Any) -> None:
    with pytest.raises(TypeError, match=r"torch\.optim\.swa_utils\.AveragedModel is right"):
        AveragedModel(make_model(), other)


OTHERS: dict[str, Callable[[Any], nn.Module]] = {
    "a copy": copy.deepcopy,
    "a quantized layer of a copy": lambda m: nn.Sequential(*m[:5], copy.deepcopy(m[5]), *m[6:]),
    "fewer": lambda m: nn.Sequential(*m[:7], nn.Linear(5, 3, bias=False)),
    "another shape": lambda m: nn.Sequential(*m[:7], nn.Linear(5, 1)),
    "buffers": lambda m: nn.Sequential(m[0], nn.BatchNorm2d(4, track_running_stats=False), *m[2:]),
}


@pytest.mark.parametrize(
    ("kind", "other"), [("float", "a copy"), *((kind, o) for kind in QUANTIZED for o in OTHERS)]
)
def test_refuses_another_model(kind: str, other: str) -> None:
    """Before anything changes."""
    run = Training(kind)
    run.go_on(0)
    before = run.bits()
    with pytest.raises(ValueError, match="is not the one that is trained and averaged"):
        run.averaged.update_parameters(OTHERS[other](run.model))
    assert run.bits() == before
