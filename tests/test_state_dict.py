"""Checkpoints: bit for bit, float32 whatever the parameters' type, refused if they do not fit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers import (
    FLOAT_GROUP,
    KINDS,
    MAIN_KINDS,
    QUANTIZED_KINDS,
    Kind,
    assert_consistent,
    clone_params,
    draw_gradients,
    everything,
    fingerprint,
    make_params,
    same_bits,
    train,
)
from torch import Tensor
from torch.nn import Parameter

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
THREE = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
QUANTIZED = pytest.mark.parametrize("kind", QUANTIZED_KINDS, ids=str)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)


def through_a_file(value: Any) -> Any:
    """What a checkpoint goes through, with nothing in it but tensors and plain values."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@ALL_KINDS
@DTYPES
@pytest.mark.parametrize("foreach", [False, True])
def test_round_trip(kind: Kind, dtype: torch.dtype, foreach: bool) -> None:
    """A new optimizer of new parameters continues to the same bits."""
    params = make_params(dtype=dtype)
    optimizer = kind.make(params, foreach=foreach, weight_decay=1e-2)
    train(optimizer, params, 5)
    saved = through_a_file(
        {"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}
    )

    # Parameters with other values, as a new process would make them, before the model is loaded.
    others = make_params(dtype=dtype, seed=99)
    other = kind.make(others, lr=7.0)
    with torch.no_grad():
        for p, value in zip(others, saved["params"], strict=True):
            p.copy_(value)
    other.load_state_dict(saved["optimizer"])
    assert everything(other) == everything(optimizer)
    assert_consistent(other)
    train(optimizer, params, 5, seed=1)
    train(other, others, 5, seed=1)
    assert everything(other) == everything(optimizer)


@QUANTIZED
@DTYPES
def test_parameters_follow_from_the_state_alone(kind: Kind, dtype: torch.dtype) -> None:
    """They are set from the loaded latents: model and optimizer can be loaded in any order."""
    shapes = ((3, 4), (2, 2, 3, 3))
    params = make_params(shapes, dtype)
    optimizer = kind.make(params)
    train(optimizer, params, 3)
    others = make_params(shapes, dtype, seed=99)
    other = kind.make(others)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(params, others, strict=True):
        assert same_bits(p, q)


@QUANTIZED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_stay_float32(kind: Kind, dtype: torch.dtype) -> None:
    """Loaded state is not cast to the parameter's type as torch does, not even there and back."""
    params = make_params(((3, 4),), dtype)
    optimizer = kind.make(params)
    train(optimizer, params, 3)
    before = fingerprint(dict(optimizer.state[params[0]]))
    latent = optimizer.state[params[0]]["latent"]
    assert not torch.equal(latent, latent.to(dtype).float())
    for _ in range(2):
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        state = optimizer.state[params[0]]
        assert fingerprint(dict(state)) == before
        assert {value.dtype for value in state.values()} == {torch.float32}


@ALL_KINDS
def test_before_the_first_step(kind: Kind) -> None:
    params, others = make_params(), make_params(seed=99)
    optimizer, other = kind.make(params), kind.make(others)
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, params, 3)
    train(other, others, 3)
    assert everything(other) == everything(optimizer)


@ALL_KINDS
def test_plain_content(kind: Kind) -> None:
    """Groups of numbers, strings, booleans and None; state of tensors."""
    params = make_params()
    optimizer = kind.make(params)
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    for state in saved["state"].values():
        assert all(isinstance(value, Tensor) for value in state.values())
    for group in saved["param_groups"]:
        for value in group.values():
            assert value is None or type(value) in (bool, int, float, str, list)


@ALL_KINDS
def test_deterministic(kind: Kind) -> None:
    """Saving twice gives the same, and saving changes nothing."""
    params = make_params()
    optimizer = kind.make(params)
    train(optimizer, params, 3)
    before = everything(optimizer)
    first, second = (fingerprint(optimizer.state_dict()) for _ in range(2))
    assert first == second
    assert everything(optimizer) == before


@ALL_KINDS
def test_loading_does_not_alias(kind: Kind) -> None:
    """The caller's tensors stay as they were while training goes on, and the other way round."""
    params = make_params()
    optimizer = kind.make(params)
    train(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = fingerprint(saved)
    twins = clone_params(params)
    twin = kind.make(twins)
    twin.load_state_dict(saved)
    assert fingerprint(saved) == kept
    train(twin, twins, 3, seed=1)
    assert fingerprint(saved) == kept
    before = everything(twin)
    for state in saved["state"].values():
        for value in state.values():
            value.fill_(17.0)
    saved["param_groups"][0]["lr"] = 17.0
    assert everything(twin) == before


@ALL_KINDS
def test_one_checkpoint_for_two_optimizers(kind: Kind) -> None:
    params = make_params()
    optimizer = kind.make(params)
    train(optimizer, params, 3)
    saved = optimizer.state_dict()
    pair = [clone_params(params) for _ in range(2)]
    optimizers = [kind.make(members) for members in pair]
    for other in optimizers:
        other.load_state_dict(saved)
    train(optimizers[0], pair[0], 3, seed=1)
    assert everything(optimizers[1]) == everything(optimizer)
    train(optimizers[1], pair[1], 3, seed=1)
    assert everything(optimizers[0]) == everything(optimizers[1])


@ALL_KINDS
def test_loading_again_and_again(kind: Kind) -> None:
    """Back to the same point, as often as wanted: also for copies and unpickled optimizers."""
    params = make_params()
    optimizer = kind.make(params)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    before = everything(optimizer)
    for _ in range(3):
        train(optimizer, params, 1, seed=1)
        optimizer.load_state_dict(saved)
        with torch.no_grad():
            for p, value in zip(params, before[0], strict=True):
                p.copy_(torch.frombuffer(bytearray(value[2]), dtype=p.dtype).reshape(p.shape))
        assert everything(optimizer) == before
    twins, twin = copy.deepcopy((params, optimizer))
    twin.load_state_dict(saved)
    train(twin, twins, 1)


@THREE
def test_settings_come_from_the_checkpoint(kind: Kind) -> None:
    """As in torch: the saved groups replace the present ones."""
    params = make_params()
    optimizer = kind.make(params, lr=0.02, momentum=0.5)
    other = kind.make(make_params(), lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    for group in other.param_groups:
        assert group["lr"] == 0.02
        assert group["momentum"] == 0.5


@THREE
def test_added_group(kind: Kind) -> None:
    """A checkpoint of two groups loads into an optimizer that got its second group later."""
    params, late = make_params(((3, 4),)), make_params(((2, 5),), seed=1)
    optimizer = kind.make(params)
    optimizer.add_param_group({"params": late, "lr": 0.3})
    train(optimizer, [*params, *late], 3)
    others, others_late = clone_params(params), clone_params(late)
    other = kind.make(others)
    other.add_param_group({"params": others_late})
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert everything(other) == everything(optimizer)


@QUANTIZED
def test_frozen_parameter(kind: Kind) -> None:
    """One that has no latents yet is saved and loaded without any."""

    def make() -> tuple[list[Parameter], Any]:
        params = make_params(((3, 4), (2, 5)))
        params[1].requires_grad_(False)
        return params, kind.make(params)

    params, optimizer = make()
    train(optimizer, params[:1], 3)
    others, other = make()
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert everything(other) == everything(optimizer)
    for frozen in (params[1], others[1]):
        frozen.requires_grad_(True)
    train(optimizer, params, 3, seed=1)
    train(other, others, 3, seed=1)
    assert everything(other) == everything(optimizer)


class TestRefused:
    """ValueError, and neither optimizer nor parameters have changed."""

    def refuse(self, optimizer: Any, saved: Any, match: str = ".") -> None:
        before = everything(optimizer)
        groups = [id(group) for group in optimizer.param_groups]
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(saved)
        assert everything(optimizer) == before
        assert [id(group) for group in optimizer.param_groups] == groups

    def trained(self, kind: Kind, shapes: tuple[tuple[int, ...], ...] = ((3, 4), (2, 5))) -> Any:
        params = make_params(shapes)
        optimizer = kind.make(params)
        train(optimizer, params, 2)
        return optimizer

    @THREE
    def test_other_shapes(self, kind: Kind) -> None:
        self.refuse(self.trained(kind), self.trained(kind, ((3, 5), (2, 5))).state_dict(), "shape")
        # The same number of elements is not enough.
        self.refuse(self.trained(kind), self.trained(kind, ((4, 3), (2, 5))).state_dict(), "shape")

    @THREE
    def test_other_number_of_parameters(self, kind: Kind) -> None:
        self.refuse(self.trained(kind), self.trained(kind, ((3, 4),)).state_dict())

    @THREE
    def test_other_number_of_groups(self, kind: Kind) -> None:
        saved = self.trained(kind).state_dict()
        saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))
        self.refuse(self.trained(kind), saved)

    @pytest.mark.parametrize(
        "foreign",
        [
            torch.optim.Adam,
            torch.optim.SGD,
            torch.optim.RMSprop,
            torch.optim.Adagrad,
            torch.optim.Rprop,
        ],
        ids=lambda cls: cls.__name__,
    )
    @THREE
    def test_of_torch(self, kind: Kind, foreign: Any) -> None:
        params = make_params(((3, 4), (2, 5)))
        other = foreign(params, lr=0.01)
        draw_gradients(params, 0)
        other.step()
        self.refuse(self.trained(kind), other.state_dict())

    @pytest.mark.parametrize(
        ("source", "target"),
        [
            pytest.param(source, target, id=f"{source}-{target}")
            for source in KINDS
            for target in KINDS
            if source.optimizer is not target.optimizer
        ],
    )
    def test_of_each_other(self, source: Kind, target: Kind) -> None:
        self.refuse(self.trained(target), self.trained(source).state_dict())

    def test_missing_state(self) -> None:
        for kind, names in (
            (QUANTIZED_KINDS[0], ("latent", "unit")),
            (QUANTIZED_KINDS[2], ("latent", "unit", "scale_pos", "scale_neg")),
        ):
            for name in names:
                saved = self.trained(kind).state_dict()
                del saved["state"][1][name]
                self.refuse(self.trained(kind), saved, name)

    def test_state_of_other_kinds(self) -> None:
        saved = self.trained(QUANTIZED_KINDS[0]).state_dict()
        saved["state"][0]["latent"] = saved["state"][0]["latent"].tolist()
        self.refuse(self.trained(QUANTIZED_KINDS[0]), saved, "latent")
        saved = self.trained(QUANTIZED_KINDS[0]).state_dict()
        saved["state"][0]["unit"] = torch.ones(3)
        self.refuse(self.trained(QUANTIZED_KINDS[0]), saved, "unit")
        saved = self.trained(QUANTIZED_KINDS[0]).state_dict()
        saved["state"][0]["latent"] = torch.ones(3, 4, dtype=torch.int64)
        self.refuse(self.trained(QUANTIZED_KINDS[0]), saved, "latent")

    @THREE
    @pytest.mark.parametrize("saved", [{}, {"state": {}}, {"epoch": 3, "model": {}}])
    def test_not_a_checkpoint(self, kind: Kind, saved: dict[str, Any]) -> None:
        self.refuse(self.trained(kind), saved)

    @THREE
    def test_bad_setting_in_it(self, kind: Kind) -> None:
        saved = self.trained(kind).state_dict()
        saved["param_groups"][0]["lr"] = -1.0
        self.refuse(self.trained(kind), saved, "lr")

    @QUANTIZED
    def test_unknown_quantizer(self, kind: Kind) -> None:
        saved = self.trained(kind).state_dict()
        saved["param_groups"][0]["quantizer"] = "octal"
        self.refuse(self.trained(kind), saved, "octal")

    def test_float_checkpoint_for_a_quantized_group(self) -> None:
        """A run without quantizer is not continued as a binary one, nor the other way round."""
        params = make_params(((3, 4),))
        plain = ProjectedDFW([{"params": params, **FLOAT_GROUP}])
        train(plain, params, 2)
        saved = plain.state_dict()
        saved["param_groups"][0]["quantizer"] = "binary"
        self.refuse(self.trained(QUANTIZED_KINDS[0], ((3, 4),)), saved, "latent")

    @THREE
    def test_after_a_refusal_training_goes_on(self, kind: Kind) -> None:
        params = make_params(((3, 4), (2, 5)))
        optimizer = kind.make(params)
        self.refuse(optimizer, self.trained(kind, ((1, 1),)).state_dict())
        train(optimizer, params, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, params, 2)
        assert_consistent(optimizer)


class TestHooks:
    @QUANTIZED
    def test_order(self, kind: Kind) -> None:
        """The user's pre-hook may change what is loaded; the post-hook sees the end result."""
        params = make_params(((3, 4),))
        optimizer = kind.make(params)
        train(optimizer, params, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        expected = optimizer.state[params[0]]["latent"].clone()
        train(optimizer, params, 2)
        calls = []

        def before(opt: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            calls.append("pre")
            changed = copy.deepcopy(incoming)
            changed["param_groups"][0]["lr"] = 0.77
            return changed

        def after(opt: Any) -> None:
            calls.append("post")
            assert torch.equal(opt.state[params[0]]["latent"], expected)
            assert_consistent(opt)

        optimizer.register_load_state_dict_pre_hook(before)
        optimizer.register_load_state_dict_post_hook(after)
        optimizer.load_state_dict(saved)
        assert calls == ["pre", "post"]
        assert optimizer.param_groups[0]["lr"] == 0.77
        # They are still the only ones.
        optimizer.load_state_dict(saved)
        assert calls == ["pre", "post"] * 2

    @QUANTIZED
    def test_latents_changed_by_a_pre_hook(self, kind: Kind) -> None:
        """What the hook returns is what is loaded, tensors included."""
        params = make_params(((3, 4),))
        optimizer = kind.make(params)
        saved = optimizer.state_dict()

        def flip(opt: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            changed = copy.deepcopy(incoming)
            changed["state"][0]["latent"].neg_()
            return changed

        before = optimizer.state[params[0]]["latent"].clone()
        optimizer.register_load_state_dict_pre_hook(flip)
        optimizer.load_state_dict(saved)
        assert torch.equal(optimizer.state[params[0]]["latent"], -before)
        assert_consistent(optimizer)

    @THREE
    def test_of_state_dict(self, kind: Kind) -> None:
        params = make_params(((3, 4),))
        optimizer = kind.make(params)
        optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "note": "mine"})
        assert optimizer.state_dict()["note"] == "mine"


@pytest.mark.parametrize("optimizer_class", [DFW, ProjectedDFW, TernaryDFW])
def test_wide_parameters_from_a_narrow_checkpoint(optimizer_class: Any) -> None:
    """A float32 run continues from a bfloat16 one and back, as torch's optimizers allow."""
    narrow = make_params(((3, 4),), torch.bfloat16)
    optimizer = optimizer_class(narrow)
    train(optimizer, narrow, 2)
    wide = [Parameter(p.detach().float()) for p in narrow]
    other = optimizer_class(wide)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    train(other, wide, 2)
    assert {value.dtype for value in other.state[wide[0]].values()} == {torch.float32}
    optimizer.load_state_dict(through_a_file(other.state_dict()))
    train(optimizer, narrow, 2)
    for p, o in ((narrow[0], optimizer), (wide[0], other)):
        assert torch.isfinite(p).all()
        assert all(torch.isfinite(value).all() for value in o.state[p].values())


@ALL_KINDS
def test_checkpoint_from_before_there_were_kernels(kind: Kind) -> None:
    params = make_params()
    optimizer = kind.make(params)
    train(optimizer, params, 2)
    older = copy.deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        del group["fused"]
    optimizer.load_state_dict(older)
    assert all(group["fused"] is None for group in optimizer.param_groups)
    train(optimizer, params, 2, seed=1)
