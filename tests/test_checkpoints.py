"""Checkpoints and copies: a run goes on from them bit for bit, or they are refused.

A refusal leaves everything as it was. Every optimizer, norm and quantizer, against the run that was
not interrupted.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_consistent, everything, fingerprint, make_params, refused, train, whole
from kinds import ALL_KINDS, BOTH_NORMS, CLASSES, KINDS, Kind
from torch import Tensor, nn
from torch.nn import Parameter

from dfw_opt import DFW, TernaryDFW, param_groups

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def through_a_file(value: Any, weights_only: bool = True) -> Any:
    """By default nothing is in it but tensors and plain values."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def take_over(params: list[Any], others: list[Parameter]) -> None:
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)


class TestResumed:
    @ALL_KINDS
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("steps", "momentum"), [(0, 0.9), (3, 0.0), (3, 0.9)])
    def test_ends_like_the_uninterrupted_run(
        self, kind: Kind, dtype: torch.dtype, steps: int, momentum: float
    ) -> None:
        """In a new process: other weights and settings at first, model loaded before or after."""
        params = make_params(dtype=dtype)
        runs = [(kind.make(params, weight_decay=1e-2, momentum=momentum), params)]
        train(*runs[0], steps)
        saved = through_a_file(([p.detach() for p in params], runs[0][0].state_dict()))
        content = fingerprint(saved)
        for order in ("model first", "optimizer first"):
            others = make_params(dtype=dtype, seed=99)
            other = kind.make(others, lr=7.0, momentum=momentum)
            if order == "model first":
                take_over(saved[0], others)
            other.load_state_dict(saved[1])
            if order != "model first":
                take_over(saved[0], others)
            assert everything(other) == everything(runs[0][0])  # latents are not cast to dtype
            runs.append((other, others))
        for run in runs:
            train(*run, 2, seed=1)
            assert_consistent(run[0])
        assert everything(runs[0][0]) == everything(runs[1][0]) == everything(runs[2][0])
        assert fingerprint(saved) == content

    @ALL_KINDS
    def test_content_is_plain(self, kind: Kind) -> None:
        """And without momentum nothing is kept for a float parameter, as with torch's SGD."""
        params = make_params()
        optimizer = kind.make(params, momentum=0.0)
        train(optimizer, params, 1)
        optimizer.param_groups[0]["lr"] = np.float64(0.1)  # a scheduler's
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            assert state
            assert all(isinstance(value, Tensor) for value in state.values())
            assert ("plane" in state) == (kind.norm == "spectral")
        if kind.norm == "euclidean":
            assert set(saved["state"]) == ({0, 1} if kind.quantized else set())
        for value in (value for group in saved["param_groups"] for value in group.values()):
            assert value is None or type(value) in (bool, int, float, str, list)

    @ALL_KINDS
    def test_frozen_weights(self, kind: Kind) -> None:
        """Their state waits to be unfrozen. One that was frozen when saved needs to be so again."""
        params, others = make_params(), make_params(seed=9)
        optimizer = kind.make(params)
        train(optimizer, params, 2)
        others[0].requires_grad_(False)
        other = kind.make(others)
        train(other, others[1:], 1)
        frozen = copy.deepcopy(other.state_dict())
        if kind.quantized or kind.norm == "spectral":  # else it may be that momentum was 0
            with refused(optimizer, "freeze it, load, then unfreeze"):
                optimizer.load_state_dict(frozen)
        other.load_state_dict(frozen)
        other.load_state_dict(optimizer.state_dict())
        others[0].requires_grad_(True)
        take_over(params, others)
        for run in ((optimizer, params), (other, others)):
            train(*run, 2)
        assert everything(other) == everything(optimizer)

    @BOTH_NORMS
    def test_under_inference_mode(self, norm: str) -> None:
        """Made and loaded there, as in evaluation; the next steps need plain tensors."""
        ends = []
        for inference in (False, True):
            params = make_params()[:2]
            with torch.inference_mode(inference):
                optimizer = TernaryDFW(params, norm=norm)
            train(optimizer, params, 2)
            with torch.inference_mode(inference):
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.relax(0.5)
            train(optimizer, params, 2, seed=1)
            ends.append(everything(optimizer))
        assert ends[0] == ends[1]


def five_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(3, 3) for _ in range(5)])


@BOTH_NORMS
@CLASSES
def test_names_decide_over_order(optimizer_class: Any, norm: str) -> None:
    """The groups of a model whose layers are registered the other way round; or of other layers."""
    model, twin = five_layers(), five_layers(1)
    optimizer = optimizer_class(param_groups(model), norm=norm)
    groups = param_groups(twin)
    for group in groups:
        for key in ("params", "param_names"):
            group[key].reverse()
        wrap = "module._orig_mod." if norm == "spectral" else "_orig_mod.module."
        group["param_names"] = [f"{wrap}{name}" for name in group["param_names"]]
    other = optimizer_class(groups, norm=norm)
    train(optimizer, list(model.parameters()), 2)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fingerprint(dict(twin.state_dict())) == fingerprint(dict(model.state_dict()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert fingerprint(optimizer.state[p]) == fingerprint(other.state[q])
    assert [g["param_names"] for g in other.param_groups] == [g["param_names"] for g in groups]
    other.load_state_dict(other.state_dict())

    optimizer = optimizer_class(param_groups(five_layers(), skip=["0", "1"]), norm=norm)
    with refused(optimizer, r"3.weight.*2.weight.*1.weight.*2.weight.*3.weight.*4.weight"):
        optimizer.load_state_dict(other.state_dict())

    twins = [optimizer_class(param_groups(five_layers(seed)), norm=norm) for seed in (2, 3)]
    for twin in twins:  # a name that is no wrapper's, beside another
        twin.param_groups[0]["param_names"][0] = "module.2.weight"
    twins[1].load_state_dict(twins[0].state_dict())
    assert fingerprint([*twins[0].state.values()]) == fingerprint([*twins[1].state.values()])


def state(key: str, value: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    """A checkpoint with another value in the state of the first parameter."""
    return lambda saved: saved["state"][0].update({key: value(saved["state"][0][key])})


def group(**settings: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved["param_groups"][0].update(settings)


REFUSED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda saved: saved.pop("state"), "not an optimizer's state dict"),
    (lambda saved: saved.update(param_groups=[3, 4]), "group 0 is none"),
    (lambda saved: saved["param_groups"].pop(), "number of parameter groups: 1.* 2"),
    (lambda saved: saved["param_groups"][0]["params"].pop(), "has 1 .*here 2"),
    (lambda saved: saved["param_groups"][1].pop("lr"), r"group 1 lacks \['lr'\]"),
    (group(lr=-1.0), "lr=-1.0"),
    (group(eps=1.0), "eps=1e-05 differs from the first group's 1.0"),
    (group(layout="rows"), "layout='rows'.*layout='matrix'"),
    (group(scale_axis=1), "scale_axis=1.*scale_axis=0"),
    (group(quantizer="binary"), "quantizer='binary'.*'ternary'"),
    (group(quantizer=None), "quantizer=None.*'ternary'"),
    (state("latent", lambda x: x.T), r"latent of shape \(6, 4\), not \(4, 6\)"),
    (state("latent", lambda x: x.tolist()), "latent that is a list"),
    (state("unit", lambda x: x * math.nan), "unit with NaN"),
    (state("latent", lambda x: x / 0), "latent with NaN or inf"),
    (state("latent", lambda x: x.long()), "not floating point"),
    (state("latent", lambda x: x.to("meta")), "no values"),
    (state("latent", lambda x: x.to_sparse()), "sparse"),
    (state("unit", lambda x: x.expand(2)), r"unit of shape \(2,\)"),
    (lambda saved: saved["state"][0].pop("latent"), r"not both have \['latent'\]"),
    (lambda saved: saved["state"][0].update(x=torch.ones(())), r"not both have \['x'\]"),
    (lambda saved: saved["state"].pop(0), "freeze it, load, then unfreeze"),
    (lambda saved: saved["state"].update({0: [1]}), r"\[1\], not a dict"),
]


class TestRefused:
    @BOTH_NORMS
    @pytest.mark.parametrize("number", range(len(REFUSED)))
    def test_nothing_is_changed(self, number: int, norm: str) -> None:
        change, message = REFUSED[number]
        kind = next(k for k in KINDS if k.name == f"ternary-{norm}")
        params, others = make_params(), make_params(seed=9)
        optimizer, other = kind.make(params), kind.make(others, lr=0.3)
        train(optimizer, params, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved)
        with refused(other, message):
            other.load_state_dict(saved)
        other.load_state_dict(optimizer.state_dict())  # the optimizer is as good as before

    @pytest.mark.parametrize(("ours", "theirs"), [*itertools.product(KINDS, repeat=2)], ids=str)
    def test_only_where_state_means_the_same(self, ours: Kind, theirs: Kind) -> None:
        """All pairs of optimizers, norms and quantizers."""
        params, others = make_params(), make_params(seed=9)
        optimizer, other = ours.make(params), theirs.make(others)
        if ours.name.replace("_closed_form", "") == theirs.name.replace("_closed_form", ""):
            other.load_state_dict(optimizer.state_dict())
            assert everything(other)[1] == everything(optimizer)[1]
            return
        said = r"as it was|of another optimizer|number of parameter groups|no setting"
        with refused(other, said):
            other.load_state_dict(optimizer.state_dict())


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: through_a_file(x, weights_only=False),
}


@ALL_KINDS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [0, 2])
def test_copies(kind: Kind, way: str, steps: int) -> None:
    """They go the same way as the original and leave it alone; so does a copy of a copy."""
    model = five_layers()
    optimizer = kind.make(model.parameters(), weight_decay=1e-2)
    train(optimizer, list(model.parameters()), steps)
    if steps:
        optimizer.step(loss=math.nan)  # which is counted
    before = whole(optimizer)
    alone = WAYS[way](optimizer)
    twin, other = WAYS[way](WAYS[way]((model, optimizer)))
    assert type(other) is type(alone) is type(optimizer)
    assert whole(other) == whole(alone) == before
    trained = [[p for g in o.param_groups for p in g["params"]] for o in (alone, other)]
    assert {id(p) for p in trained[1]} == {id(p) for p in twin.parameters()}
    train(alone, trained[0], 1)
    train(other, list(twin.parameters()), 2, seed=1)
    assert whole(optimizer) == before
    train(optimizer, list(model.parameters()), 2, seed=1)
    assert whole(optimizer) == whole(other) != before
    other.load_state_dict(optimizer.state_dict())
    late = Parameter(torch.eye(2))
    other.add_param_group({"params": [late], "lr": 0.3})
    assert everything(other)[1][:-1] == everything(optimizer)[1]
    assert ("latent" in other.state[late]) == kind.quantized


@pytest.fixture(params=[False, True], ids=["set", "swap"])
def swapping(request: pytest.FixtureRequest) -> Any:
    """Whether model.to() puts new tensors into the parameters, as torch is to do one day."""
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
class TestMoved:
    @ALL_KINDS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_to_another_dtype(self, kind: Kind, dtype: torch.dtype) -> None:
        """Once the optimizer is made: state is as wide, or float32, and training goes on."""
        model = five_layers()
        optimizer = kind.make(model.parameters())
        train(optimizer, list(model.parameters()), 2)
        before = everything(optimizer)[1]
        model.to(dtype)
        assert everything(optimizer)[1] == before
        for p in model.parameters():
            p.grad = None
        train(optimizer, list(model.parameters()), 2, seed=1)
        assert {p.dtype for p in model.parameters()} == {dtype}
        kept = {v.dtype for s in optimizer.state.values() for v in s.values()}
        assert kept == {torch.promote_types(dtype, torch.float32)}
        assert int(optimizer.skipped_steps) == 0
        assert_consistent(optimizer)

    @BOTH_NORMS
    def test_made_on_meta(self, norm: str) -> None:
        """Steps of what has values by then are those of an optimizer that is made by then."""
        if not torch.__future__.get_swap_module_params_on_conversion():
            return  # to_empty() makes new parameters, of which the optimizer knows nothing
        with torch.device("meta"):
            model = five_layers()
        early = DFW(model.parameters(), norm=norm)
        model.to_empty(device="cpu")
        twin = five_layers()
        model.load_state_dict(twin.state_dict())
        late = DFW(twin.parameters(), norm=norm)
        before = [p.detach().clone() for p in model.parameters()]
        for m, o in ((model, early), (twin, late)):
            train(o, list(m.parameters()), 2)
        assert whole(early) == whole(late)
        assert not any(map(torch.equal, model.parameters(), before))
