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
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    KINDS,
    QUANTIZED_KINDS,
    Kind,
    assert_consistent,
    clone_params,
    everything,
    fingerprint,
    make_params,
    same_bits,
    train,
)
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, lr_scheduler

from dfw_opt import DFW, ProjectedDFW, TernaryDFW, param_groups

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
QUANTIZED = pytest.mark.parametrize("kind", QUANTIZED_KINDS, ids=str)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
NORMS = pytest.mark.parametrize("norm", ["spectral", "euclidean"])


def through_a_file(value: Any) -> Any:
    """Nothing in it but tensors and plain values."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def take_over(params: list[Parameter], others: list[Parameter]) -> None:
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)


def whole(optimizer: Any) -> Any:
    return everything(optimizer), fingerprint([optimizer.gamma, optimizer.skipped_steps])


class TestResumed:
    @ALL_KINDS
    @DTYPES
    @pytest.mark.parametrize("steps", [0, 3])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_ends_like_the_uninterrupted_run(
        self, kind: Kind, dtype: torch.dtype, steps: int, momentum: float
    ) -> None:
        """In a new process: other weights and settings at first, model loaded before or after."""
        params = make_params(dtype=dtype)
        optimizer = kind.make(params, weight_decay=1e-2, momentum=momentum)
        train(optimizer, params, steps)
        saved = through_a_file(([p.detach() for p in params], optimizer.state_dict()))
        ends = [optimizer]
        for model_first in (True, False):
            others = make_params(dtype=dtype, seed=99)
            other = kind.make(others, lr=7.0, momentum=momentum)
            for model in (model_first, not model_first):
                if model:
                    take_over(saved[0], others)
                else:
                    other.load_state_dict(saved[1])
            assert everything(other) == everything(optimizer)
            ends.append(other)
        for other in ends:
            train(other, [p for g in other.param_groups for p in g["params"]], 3, seed=1)
            assert_consistent(other)
        assert everything(ends[0]) == everything(ends[1]) == everything(ends[2])

    @QUANTIZED
    @DTYPES
    def test_latents_keep_their_precision(self, kind: Kind, dtype: torch.dtype) -> None:
        """It is not cast to the parameter's dtype, and weights follow from the latents alone."""
        params, others = make_params(dtype=dtype)[:2], make_params(dtype=dtype, seed=9)[:2]
        optimizer, other = kind.make(params), kind.make(others)
        train(optimizer, params, 3)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        for p, q in zip(params, others, strict=True):
            assert same_bits(p, q)
            assert {value.dtype for value in other.state[q].values()} == {
                torch.promote_types(dtype, torch.float32)
            }
            assert fingerprint(other.state[q]) == fingerprint(optimizer.state[p])
            if dtype.itemsize == 2:
                latent = optimizer.state[p]["latent"]
                assert not torch.equal(latent, latent.to(dtype).float())

    @ALL_KINDS
    def test_loaded_tensors_are_not_shared(self, kind: Kind) -> None:
        params, others = make_params(), make_params(seed=9)
        optimizer, other = kind.make(params), kind.make(others)
        train(optimizer, params, 1)
        saved = optimizer.state_dict()
        before = fingerprint(saved)
        other.load_state_dict(saved)
        train(other, others, 2)
        assert fingerprint(saved) == before

    @ALL_KINDS
    def test_content_is_plain(self, kind: Kind) -> None:
        """And without momentum nothing is kept for a float parameter, as with torch's SGD."""
        params = make_params()
        optimizer = kind.make(params, momentum=0.0)
        train(optimizer, params, 1)
        saved = optimizer.state_dict()
        assert set(saved) == {"state", "param_groups"}
        for state in saved["state"].values():
            assert state
            assert all(isinstance(value, Tensor) for value in state.values())
            assert ("plane_height" in state) == (kind.norm == "spectral")
        for group in saved["param_groups"]:
            for value in group.values():
                assert value is None or type(value) in (bool, int, float, str, list)
        if kind.norm == "euclidean":
            assert set(saved["state"]) == ({0, 1} if kind.quantized else set())

    @ALL_KINDS
    def test_the_plane_comes_back(self, kind: Kind) -> None:
        """What the last step left of it decides over the next γ."""
        params = make_params()
        optimizer = kind.make(params)
        train(optimizer, params, 2)
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            if "plane_height" in state:
                state["plane_height"].fill_(0.125)
        optimizer.load_state_dict(saved)
        heights = {
            float(s["plane_height"])
            for s in optimizer.state_dict()["state"].values()
            if "plane_height" in s
        }
        assert heights == ({0.125} if kind.norm == "spectral" else set())

    @ALL_KINDS
    def test_frozen_when_loaded(self, kind: Kind) -> None:
        """The state waits for the parameter to be unfrozen; then the run is the other one."""
        params, others = make_params(), make_params(seed=9)
        optimizer = kind.make(params)
        train(optimizer, params, 2)
        others[0].requires_grad_(False)
        other = kind.make(others)
        other.load_state_dict(optimizer.state_dict())
        others[0].requires_grad_(True)
        take_over(params, others)
        train(optimizer, params, 2)
        train(other, others, 2)
        assert everything(other) == everything(optimizer)

    @NORMS
    def test_under_inference_mode(self, norm: str) -> None:
        """Made and loaded there, as in evaluation; the next steps need plain tensors."""
        ends = []
        for inference in (False, True):
            params = make_params()[:2]
            with torch.inference_mode(inference):
                optimizer = TernaryDFW(params, norm=norm)
            train(optimizer, params, 2)
            with torch.inference_mode(inference):
                saved = optimizer.state_dict()
                optimizer.load_state_dict(saved)
                optimizer.relax(0.5)
            train(optimizer, params, 2, seed=1)
            ends.append(everything(optimizer))
        assert ends[0] == ends[1]


def five_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(3, 3) for _ in range(5)])


class TestNames:
    @NORMS
    @pytest.mark.parametrize("optimizer_class", [DFW, ProjectedDFW, TernaryDFW])
    def test_another_order_is_matched_by_name(self, optimizer_class: Any, norm: str) -> None:
        """The groups of a model whose layers are registered the other way round."""
        model, twin = five_layers(), five_layers(1)
        optimizer = optimizer_class(param_groups(model), norm=norm)
        groups = param_groups(twin)
        for group in groups:
            for key in ("params", "param_names"):
                group[key].reverse()
        other = optimizer_class(groups, norm=norm)
        train(optimizer, list(model.parameters()), 2)
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        assert fingerprint(dict(twin.state_dict())) == fingerprint(dict(model.state_dict()))
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert fingerprint(optimizer.state[p]) == fingerprint(other.state[q]), name
        for o, m in ((optimizer, model), (other, twin)):
            train(o, list(m.parameters()), 2, seed=1)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(q, p)  # the sums are in another order
        assert [g["param_names"] for g in other.param_groups] == [g["param_names"] for g in groups]

    @pytest.mark.parametrize("optimizer_class", [DFW, ProjectedDFW, TernaryDFW])
    def test_other_names_are_refused_with_both_lists(self, optimizer_class: Any) -> None:
        saved = optimizer_class(param_groups(five_layers(), skip=["0", "4"])).state_dict()
        other = optimizer_class(param_groups(five_layers(), skip=["0", "1"]))
        before = everything(other)
        with pytest.raises(
            ValueError, match=r"1.weight.*2.weight.*3.weight.*2.weight.*3.weight.*4.weight"
        ):
            other.load_state_dict(saved)
        assert everything(other) == before

    def test_named_on_one_side_alone_goes_by_order(self) -> None:
        model, twin = five_layers(), five_layers()
        named, plain = DFW(model.named_parameters()), DFW(twin.parameters())
        train(named, list(model.parameters()), 2)
        plain.load_state_dict(named.state_dict())
        assert everything(plain)[1] == everything(named)[1]
        named.load_state_dict(plain.state_dict())
        assert everything(plain)[1] == everything(named)[1]


def in_state(key: str, value: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    def change(saved: dict[str, Any]) -> None:
        saved["state"][0][key] = value(saved["state"][0][key])

    return change


def in_group(**settings: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved["param_groups"][0].update(settings)


def first(change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: change(saved["state"])


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "of a model": (lambda saved: {"weight": torch.zeros(2)}, "not an optimizer's state dict"),
    "no state": (lambda saved: {"param_groups": saved["param_groups"]}, "state"),
    "a number for a group": (lambda saved: saved | {"param_groups": [3, 4]}, "group 0 is none"),
    "a group without params": (lambda saved: saved | {"param_groups": [{}, {}]}, "group 0 is none"),
    "a group less": (
        lambda saved: saved["param_groups"].pop(),
        "number of parameter groups: 1.* 2",
    ),
    "a parameter less": (lambda saved: saved["param_groups"][0]["params"].pop(), "has 1 .*here 2"),
    "no lr": (lambda saved: saved["param_groups"][1].pop("lr"), r"group 1 lacks \['lr'\]"),
    "lr below 0": (in_group(lr=-1.0), "lr=-1.0"),
    "another norm": (in_group(norm="frobenius"), "norm='frobenius'"),
    "another layout": (in_group(layout="rows"), "layout='rows'.*layout='matrix'"),
    "another axis": (in_group(scale_axis=1), "scale_axis=1.*scale_axis=0"),
    "another quantizer": (in_group(quantizer="binary"), "quantizer='binary'.*'ternary'"),
    "float": (in_group(quantizer=None), "quantizer=None.*'ternary'"),
    "transposed": (in_state("latent", lambda x: x.T), r"latent of shape \(6, 4\), not \(4, 6\)"),
    "not a tensor": (in_state("latent", lambda x: x.tolist()), "latent that is a list"),
    "not a number": (in_state("unit", lambda x: x * math.nan), "unit with NaN"),
    "infinite": (in_state("latent", lambda x: x / 0), "latent with NaN or inf"),
    "whole numbers": (in_state("latent", lambda x: x.long()), "not floating point"),
    "without values": (in_state("latent", lambda x: x.to("meta")), "no values"),
    "sparse": (in_state("latent", lambda x: x.to_sparse()), "sparse"),
    "a matrix for a number": (in_state("unit", lambda x: x.expand(2)), r"unit of shape \(2,\)"),
    "no latent": (first(lambda state: [state[0].pop("latent")]), r"lacks \['latent'\]"),
    "a key more": (first(lambda state: state[0].update(x=torch.ones(()))), r"has \['x'\]"),
    "no state of a parameter": (first(lambda s: [s.pop(0)]), "freeze it, load, then unfr"),
    "a list for a state": (first(lambda state: state.update({0: [1]})), r"\[1\], not a dict"),
}


NEW = ("of a model", "no state", "a number for a group", "a group without params")
"""Those that make a new state dict, where the others change it in place."""


class TestRefused:
    @NORMS
    @pytest.mark.parametrize("how", REFUSED)
    def test_nothing_is_changed(self, how: str, norm: str) -> None:
        params, others = make_params(), make_params(seed=9)
        kind = next(k for k in KINDS if k.name == f"ternary-{norm}")
        optimizer, other = kind.make(params), kind.make(others, lr=0.3)
        train(optimizer, params, 2)
        train(other, others, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        change, message = REFUSED[how]
        changed = change(saved)
        before = whole(other)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(changed if how in NEW else saved)
        assert whole(other) == before
        other.load_state_dict(optimizer.state_dict())  # the optimizer is as good as before
        train(other, others, 1, seed=1)

    @pytest.mark.parametrize(
        ("ours", "theirs"), [*itertools.product(KINDS, repeat=2)], ids=lambda kind: kind.name
    )
    def test_only_where_state_means_the_same(self, ours: Kind, theirs: Kind) -> None:
        """All pairs of optimizers, norms and quantizers."""
        params, others = make_params(), make_params(seed=9)
        optimizer, other = ours.make(params), theirs.make(others)
        train(optimizer, params, 1)
        before = whole(other)
        means = [kind.name.replace("_closed_form", "") for kind in (ours, theirs)]
        if means[0] == means[1]:
            other.load_state_dict(optimizer.state_dict())
            assert everything(other)[1] == everything(optimizer)[1]
            return
        with pytest.raises(
            ValueError, match=r"as it was|of another optimizer|number of parameter gr|no setting"
        ):
            other.load_state_dict(optimizer.state_dict())
        assert whole(other) == before

    @pytest.mark.parametrize("ours", [DFW, ProjectedDFW])
    def test_of_torchs_sgd(self, ours: Any) -> None:
        params = make_params()[:2]
        sgd = SGD(params, 0.1, momentum=0.9)
        optimizer = ours(clone_params(params))
        before = whole(optimizer)
        with pytest.raises(ValueError, match=r"of another optimizer: .* lacks \[.*'eps'.*'norm'"):
            optimizer.load_state_dict(sgd.state_dict())
        assert whole(optimizer) == before

    @NORMS
    def test_saved_while_frozen(self, norm: str) -> None:
        """The message says what to do, and that works."""
        params, others = make_params()[:2], make_params(seed=9)[:2]
        params[0].requires_grad_(False)
        optimizer, other = ProjectedDFW(params, norm=norm), ProjectedDFW(others, norm=norm)
        train(optimizer, params[1:], 2)
        saved = optimizer.state_dict()
        with pytest.raises(ValueError, match="freeze it, load, then unfreeze"):
            other.load_state_dict(saved)
        others = make_params(seed=9)[:2]
        others[0].requires_grad_(False)
        other = ProjectedDFW(others, norm=norm)
        other.load_state_dict(saved)
        others[0].requires_grad_(True)
        train(other, others, 1)
        assert_consistent(other)


# Copies -------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: torch.load(save(x), weights_only=False),
}
ALL_WAYS = pytest.mark.parametrize("way", WAYS)


def save(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def fit(model: nn.Module, optimizer: Any, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator).to(dtype)
        labels = torch.randint(3, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(loss=loss)


class TestCopies:
    @ALL_KINDS
    @ALL_WAYS
    @pytest.mark.parametrize("steps", [0, 2])
    def test_of_model_and_optimizer(self, kind: Kind, way: str, steps: int) -> None:
        """They go the same way as the original and leave it alone; so does a copy of a copy."""
        model = net()
        optimizer = kind.make(model.parameters(), weight_decay=1e-2)
        fit(model, optimizer, steps)
        if steps:
            optimizer.step(loss=math.nan)
        before = whole(optimizer)
        copied = WAYS[way](WAYS[way]((model, optimizer)))
        twin, other = copied
        assert type(other) is type(optimizer)
        assert whole(other) == before
        trained = {id(p) for group in other.param_groups for p in group["params"]}
        assert trained == {id(p) for p in twin.parameters()}
        fit(twin, other, 2, seed=1)
        assert whole(optimizer) == before
        fit(model, optimizer, 2, seed=1)
        after = whole(other)
        assert whole(optimizer) == after != before
        other.load_state_dict(optimizer.state_dict())
        late = Parameter(torch.eye(2))
        other.add_param_group({"params": [late], "lr": 0.3})
        assert everything(other)[1][:-1] == after[0][1]
        assert (other.state[late].keys() >= {"latent"}) == kind.quantized

    @ALL_KINDS
    @ALL_WAYS
    def test_of_the_optimizer_alone(self, kind: Kind, way: str) -> None:
        """It takes parameters of its own along."""
        params = make_params()
        optimizer = kind.make(params)
        train(optimizer, params, 2)
        before = whole(optimizer)
        other = WAYS[way](optimizer)
        assert whole(other) == before
        others = [p for group in other.param_groups for p in group["params"]]
        assert not {id(p) for p in others} & {id(p) for p in params}
        train(other, others, 1)
        assert whole(optimizer) == before

    @ALL_WAYS
    def test_schedulers_and_frozen_weights_come_along(self, way: str) -> None:
        model = net()
        frozen = model.get_parameter("2.weight").requires_grad_(False)
        optimizer = TernaryDFW(param_groups(model))
        scheduler: Any = lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9)
        fit(model, optimizer, 1)
        scheduler.step()
        twin, other, its_scheduler = WAYS[way]((model, optimizer, scheduler))
        assert its_scheduler.optimizer is other
        assert same_bits(twin.get_parameter("2.weight"), frozen)
        for m, o, s in ((model, optimizer, scheduler), (twin, other, its_scheduler)):
            m.get_parameter("2.weight").requires_grad_(True)
            fit(m, o, 1, seed=1)
            s.step()
            fit(m, o, 1, seed=2)
        assert whole(other) == whole(optimizer)
        assert len(twin.get_parameter("2.weight").unique()) <= 3


# Moves --------------------------------------------------------------------------------------------


@pytest.fixture
def swapping() -> Iterator[None]:
    """model.to() puts new tensors into the parameters, as torch is to do by default one day."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


class TestMoved:
    @ALL_KINDS
    @pytest.mark.parametrize("swap", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_to_another_dtype(
        self, kind: Kind, dtype: torch.dtype, swap: bool, request: pytest.FixtureRequest
    ) -> None:
        """Once the optimizer is made: state stays what it is, and training goes on."""
        if swap:
            request.getfixturevalue("swapping")
        model = net()
        optimizer = kind.make(model.parameters())
        fit(model, optimizer, 2)
        before = everything(optimizer)[1]
        model.to(dtype)
        assert everything(optimizer)[1] == before
        fit(model, optimizer, 2, seed=1)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {torch.float32}
        assert everything(optimizer)[1] != before
        assert int(optimizer.skipped_steps) == 0
        assert_consistent(optimizer)

    @NORMS
    @pytest.mark.usefixtures("swapping")
    def test_made_on_meta(self, norm: str) -> None:
        """Steps of what has values by then are those of an optimizer that is made by then."""
        with torch.device("meta"):
            model = net()
        early = DFW(model.parameters(), norm=norm)
        model.to_empty(device="cpu")
        twin = net()
        model.load_state_dict(twin.state_dict())
        late = DFW(twin.parameters(), norm=norm)
        before = [p.detach().clone() for p in model.parameters()]
        for m, o in ((model, early), (twin, late)):
            fit(m, o, 2)
        assert whole(early) == whole(late)
        assert not any(map(torch.equal, model.parameters(), before))

    @NORMS
    @pytest.mark.parametrize("optimizer_class", [ProjectedDFW, TernaryDFW])
    def test_nothing_to_quantize_on_meta(self, optimizer_class: Any, norm: str) -> None:
        with torch.device("meta"):
            model = net()
        with pytest.raises(ValueError, match=r"\(8, 8\).*meta device.*to_empty"):
            optimizer_class(param_groups(model), norm=norm)
