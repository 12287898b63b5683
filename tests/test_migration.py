"""What other packages compute, transcribed from their source in numpy, and what becomes of it here.

docs/migration.md says what is the same and what is not; each such sentence has its test here. The
transcriptions follow the packages, not the papers, and know nothing of this one:
oval-group/dfw at 212cca7 (dfw/dfw.py, dfw/losses/hinge.py), oval-group/ali-g at c40de14
(alig/th/alig.py, alig/th/projection.py), pytorch/ao at 36027d8 (torchao/prototype/parq).
"""

# torch leaves backward() untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import PATHS, TORCH_PATHS, everything, same_bits, to_numpy
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Adam

from dfw_opt import DFW, MultiClassHingeLoss, ProjectedDFW, TernaryDFW, param_groups

Array = npt.NDArray[np.float64]
Gradients = list[list[Array | None]]

STEPS = 80
ALL_PATHS = pytest.mark.parametrize("path", PATHS)
# Sums in another order than numpy's.
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


class OriginalDFW:
    """The `dfw` package's optimizer. Groups have `params`, `eta`, `momentum`, `weight_decay`."""

    def __init__(self, groups: list[dict[str, Any]], eps: float = 1e-5) -> None:
        self.groups, self.eps, self.gamma = groups, eps, math.nan
        for group in groups:
            group["z"] = [np.zeros_like(w) for w in group["params"]]

    def step(self, loss: float, gradients: Gradients) -> None:
        numerator, denominator = loss, 0.0
        for group, deltas in zip(self.groups, gradients, strict=True):
            for w, delta in zip(group["params"], deltas, strict=True):
                if delta is not None:
                    r = group["weight_decay"] * w
                    numerator -= group["eta"] * float((delta * r).sum())
                    denominator += group["eta"] * float(np.sqrt((delta * delta).sum())) ** 2
        self.gamma = float(np.clip(numerator / (denominator + self.eps), 0.0, 1.0))

        for group, deltas in zip(self.groups, gradients, strict=True):
            eta, mu = group["eta"], group["momentum"]
            for w, delta, z in zip(group["params"], deltas, group["z"], strict=True):
                if delta is not None:
                    r = group["weight_decay"] * w
                    w -= eta * (r + self.gamma * delta)
                    if mu:
                        z *= mu
                        z -= eta * self.gamma * (delta + r)
                        w += mu * z


class OriginalAliG:
    """The ALI-G package's optimizer for PyTorch. Groups have `params`, `max_lr`, `momentum`."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        projection: Callable[[], None] | None = None,
        eps: float = 1e-5,
        adjusted_momentum: bool = False,
    ) -> None:
        self.groups, self.projection, self.eps = groups, projection, eps
        self.adjusted = adjusted_momentum
        for group in groups:
            group["buffers"] = [np.zeros_like(w) for w in group["params"]]
        if projection is not None:
            projection()

    def step(self, loss: float, gradients: Gradients) -> None:
        square = sum(float((g * g).sum()) for gs in gradients for g in gs if g is not None)
        unclipped = loss / (square + self.eps)
        for group, gs in zip(self.groups, gradients, strict=True):
            limit, mu = group["max_lr"], group["momentum"]
            group["step_size"] = step = unclipped if limit is None else min(unclipped, limit)
            for w, g, buffer in zip(group["params"], gs, group["buffers"], strict=True):
                if g is None:
                    continue
                w -= step * g
                if mu and self.adjusted:
                    buffer *= mu
                    buffer -= g
                    w += step * mu * buffer
                elif mu:
                    buffer *= mu
                    buffer -= step * g
                    w += mu * buffer
        if self.projection is not None:
            self.projection()


SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (((3, 4), (5,)), ((2, 2, 3),), ((4,),))


def start(dtype: torch.dtype, settings: Sequence[dict[str, Any]]) -> tuple[Any, Any]:
    """The same groups twice: arrays for a transcription, parameters for an optimizer."""
    generator = np.random.default_rng(0)
    theirs, ours = [], []
    for shapes, options in zip(SHAPES, settings, strict=False):
        params = [Parameter(torch.tensor(generator.normal(0, 0.3, s)).to(dtype)) for s in shapes]
        theirs.append({"params": [to_numpy(p) for p in params], **options})
        ours.append({"params": params, **options})
    return theirs, ours


def walk(
    groups: list[dict[str, Any]], shares: Sequence[float], seed: int = 0
) -> Iterator[tuple[int, float, Gradients]]:
    """A noisy regression: losses and gradients at the transcription's weights.

    `shares` are factors of the loss, drawn from at random, so that γ is 0, 1, and between. Now and
    then a parameter has no gradient.
    """
    generator = np.random.default_rng(seed)
    for number in range(STEPS):
        loss, gradients = 0.0, []
        for index, group in enumerate(groups):
            row: list[Array | None] = []
            for w in group["params"]:
                error = w - generator.normal(0, 1, w.shape)
                loss += 0.5 * float((error * error).sum())
                row.append(None if (number + index) % 7 == 6 else error)
            gradients.append(row)
        yield number, loss * float(generator.choice(shares)), gradients


def give(groups: list[dict[str, Any]], gradients: Gradients) -> None:
    for group, row in zip(groups, gradients, strict=True):
        for p, gradient in zip(group["params"], row, strict=True):
            p.grad = None if gradient is None else torch.tensor(gradient).to(p.dtype)


def assert_same_weights(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], **tolerance: Any
) -> None:
    for group, other in zip(ours, theirs, strict=True):
        for p, w in zip(group["params"], other["params"], strict=True):
            torch.testing.assert_close(p.detach().double(), torch.tensor(w), **tolerance)


def renamed(groups: list[dict[str, Any]], old: str) -> list[dict[str, Any]]:
    """All that the groups of another package need."""
    return [{"lr": group.pop(old), **group} for group in groups]


DFW_SETTINGS = (
    {"eta": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    {"eta": 0.03, "momentum": 0.5, "weight_decay": 0.0},
    {"eta": 0.3, "momentum": 0.0, "weight_decay": 0.5},
)


class TestOriginalDFW:
    @ALL_PATHS
    @pytest.mark.parametrize("eps", [1e-5, 0.7])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [
            pytest.param(torch.float64, EXACT, id="float64"),
            pytest.param(torch.float32, {"rtol": 1e-3, "atol": 1e-4}, id="float32"),
        ],
    )
    def test_trajectory(
        self, path: str, eps: float, dtype: torch.dtype, tolerance: dict[str, Any]
    ) -> None:
        """Several groups, weight decay, momentum; γ, weights and momentum, at every step."""
        theirs, ours = start(dtype, DFW_SETTINGS)
        expected = OriginalDFW(theirs, eps)
        optimizer = DFW(renamed(ours, "eta"), eps=eps, **PATHS[path])
        groups: Any = optimizer.param_groups
        gammas = []
        for number, loss, gradients in walk(theirs, (-0.1, 0.0, 1e-3, 0.02, 0.1, 1.0)):
            give(groups, gradients)
            expected.step(loss, gradients)
            optimizer.step(loss=loss)
            gammas.append(expected.gamma)
            assert float(optimizer.gamma) == pytest.approx(
                expected.gamma, rel=tolerance["rtol"], abs=tolerance["atol"]
            ), f"step {number}"
            assert_same_weights(groups, theirs, **tolerance)
        for group, other in zip(groups, theirs, strict=True):
            for p, z in zip(group["params"], other["z"], strict=True):
                if group["momentum"]:
                    torch.testing.assert_close(
                        optimizer.state[p]["momentum_buffer"].double(), torch.tensor(z), **tolerance
                    )
        assert sum(gamma == 0.0 for gamma in gammas) >= 10
        assert sum(0.0 < gamma < 1.0 for gamma in gammas) >= 10
        assert eps == 0.7 or sum(gamma == 1.0 for gamma in gammas) >= 10

    def test_their_step_works_unchanged(self) -> None:
        """`step(lambda: float(loss))` is a closure that has nothing left to do."""
        outcomes = []
        for as_closure in (True, False):
            torch.manual_seed(0)
            model = nn.Linear(4, 3)
            optimizer = DFW(model.parameters(), lr=0.1)
            for seed in range(5):
                generator = torch.Generator().manual_seed(seed)
                x, y = torch.randn(8, 4, generator=generator), torch.arange(8) % 3
                loss = MultiClassHingeLoss()(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                if as_closure:
                    value = float(loss.detach())
                    optimizer.step(lambda value=value: value)  # type: ignore[misc]
                else:
                    optimizer.step(loss=loss)
            outcomes.append([p.detach() for p in model.parameters()])
        for p, q in zip(*outcomes, strict=True):
            assert torch.equal(p, q)

    def test_their_checkpoint(self) -> None:
        """It is refused as it is; with two keys renamed or added the run goes on."""
        theirs, ours = start(torch.float64, DFW_SETTINGS)
        expected = OriginalDFW(theirs)
        steps = list(itertools.islice(walk(theirs, (0.02, 0.1)), 20))
        for _, loss, gradients in steps[:10]:
            expected.step(loss, gradients)
        # As their optimizer saves it: groups without eps, momentum where there is any.
        numbers = itertools.count()
        saved: dict[str, Any] = {"state": {}, "param_groups": []}
        for group in theirs:
            indices = [next(numbers) for _ in group["params"]]
            options = {name: group[name] for name in ("eta", "momentum", "weight_decay")}
            saved["param_groups"].append({**options, "params": indices})
            for index, z in zip(indices, group["z"], strict=True):
                if group["momentum"]:
                    saved["state"][index] = {"momentum_buffer": torch.tensor(z)}

        optimizer = DFW(renamed(ours, "eta"))
        for mine, other in zip(optimizer.param_groups, theirs, strict=True):
            for p, w in zip(mine["params"], other["params"], strict=True):
                p.data.copy_(torch.tensor(w))
        before = everything(optimizer)
        with pytest.raises(ValueError, match=r"lacks \['eps', 'lr'\]"):
            optimizer.load_state_dict(copy.deepcopy(saved))
        assert everything(optimizer) == before
        for group in saved["param_groups"]:
            group["lr"] = group.pop("eta")
            group["eps"] = 1e-5
        optimizer.load_state_dict(saved)
        for _, loss, gradients in steps[10:]:
            give(optimizer.param_groups, gradients)
            expected.step(loss, gradients)
            optimizer.step(loss=loss)
        assert_same_weights(optimizer.param_groups, theirs, **EXACT)

    @pytest.mark.parametrize("loss", [math.nan, math.inf])
    def test_difference_loss_that_is_not_finite(self, loss: float) -> None:
        """There NaN goes into every weight, and an infinite loss counts as a large one."""
        theirs, ours = start(torch.float64, DFW_SETTINGS)
        expected, optimizer = OriginalDFW(theirs), DFW(renamed(ours, "eta"))
        _, _, gradients = next(walk(theirs, (1.0,)))
        give(optimizer.param_groups, gradients)
        before = everything(optimizer)[0]
        optimizer.step(loss=loss)
        expected.step(loss, gradients)
        assert everything(optimizer)[0] == before
        assert int(optimizer.skipped_steps) == 1
        if math.isnan(loss):
            assert all(np.isnan(w).all() for group in theirs for w in group["params"])
        else:
            assert expected.gamma == 1.0

    def test_difference_nothing_over_nothing(self) -> None:
        """With eps=0, no loss and no gradient: NaN there. Here only the decay acts."""
        theirs, ours = start(torch.float64, DFW_SETTINGS[:1])
        optimizer = DFW(renamed(ours, "eta"), eps=0.0)
        zeros: Gradients = [[np.zeros_like(w) for w in theirs[0]["params"]]]
        before = [w.copy() for w in theirs[0]["params"]]
        give(optimizer.param_groups, zeros)
        optimizer.step(loss=0.0)
        with pytest.raises(ZeroDivisionError):  # as Python has it; for torch's tensors it is NaN
            OriginalDFW(theirs, eps=0.0).step(0.0, zeros)
        eta, mu, decay = 0.1, 0.9, 1e-2
        for p, w in zip(optimizer.param_groups[0]["params"], before, strict=True):
            # γ is 1, so the decay is in the momentum as well.
            torch.testing.assert_close(p.detach(), torch.tensor(w * (1 - eta * decay * (1 + mu))))

    def test_difference_defaults(self) -> None:
        """There eta is required and momentum 0; 0 and 1 and more are refused by one of the two."""
        group = DFW([Parameter(torch.zeros(2))]).param_groups[0]
        assert (group["lr"], group["momentum"], group["eps"]) == (0.1, 0.9, 1e-5)
        assert DFW([Parameter(torch.zeros(2))], lr=0.0).param_groups[0]["lr"] == 0.0
        with pytest.raises(ValueError, match="momentum"):
            DFW([Parameter(torch.zeros(2))], momentum=1.0)


def original_hinge(scores: Array, targets: Array, smooth: bool) -> tuple[float, Array]:
    """Value and gradient of the `dfw` package's loss; ξ is a constant there too."""
    count, classes = scores.shape
    labels = targets.astype(int)
    own = scores[np.arange(count), labels][:, None]
    augmented = scores + (labels[:, None] != np.arange(classes)) - own
    xi = (augmented.argmax(axis=1)[:, None] == np.arange(classes)).astype(float)
    if smooth:
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        soft = exponentials / exponentials.sum(axis=1, keepdims=True)
        mask = ((soft * augmented).sum(axis=1) >= 0).astype(float)[:, None]
        xi = mask * soft + (1 - mask) * xi
    gradient = xi.copy()
    gradient[np.arange(count), labels] -= xi.sum(axis=1)
    return float((augmented * xi).sum() / count), gradient / count


def our_hinge(scores: Array, targets: Array, smooth: bool) -> tuple[float, Array]:
    s = torch.tensor(scores, requires_grad=True)
    loss = MultiClassHingeLoss(smooth=smooth)(s, torch.tensor(targets).long())
    loss.backward()
    assert s.grad is not None
    return float(loss.detach()), to_numpy(s.grad)


@pytest.mark.parametrize("smooth", [False, True])
class TestOriginalHinge:
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
    def test_random(self, smooth: bool, scale: float) -> None:
        generator = np.random.default_rng(0)
        for _ in range(50):
            scores = generator.normal(0, scale, (7, 5))
            targets = generator.integers(0, 5, 7).astype(float)
            value, gradient = our_hinge(scores, targets, smooth)
            wanted, slope = original_hinge(scores, targets, smooth)
            assert value == pytest.approx(wanted, rel=1e-13, abs=1e-13)
            np.testing.assert_allclose(gradient, slope, rtol=1e-12, atol=1e-14)

    def test_all_small_whole_numbers(self, smooth: bool) -> None:
        """Every tie there is: of the label with others at its margin, and among the others.

        One sample at a time, so that the subgradient chosen for each is compared.
        """
        ties = on_the_margin = 0
        for row in itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=3):
            for label in range(3):
                scores, targets = np.array([row]), np.array([float(label)])
                value, gradient = our_hinge(scores, targets, smooth)
                wanted, slope = original_hinge(scores, targets, smooth)
                assert value == pytest.approx(wanted, abs=1e-15)
                np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-15)
                margins = sorted(row[y] + (y != label) - row[label] for y in range(3))
                ties += margins[1] == margins[2]
                on_the_margin += margins[1] == margins[2] == 0
        assert ties > 50
        assert on_the_margin > 20

    def test_all_scores_equal(self, smooth: bool) -> None:
        for classes, label in ((2, 0), (2, 1), (10, 0), (10, 7)):
            scores, targets = np.full((1, classes), 0.25), np.array([float(label)])
            found, wanted = (f(scores, targets, smooth) for f in (our_hinge, original_hinge))
            assert found[0] == pytest.approx(wanted[0], abs=1e-15)
            np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=1e-15)

    def test_difference_rounding_of_large_scores(self, smooth: bool) -> None:
        """There 1 is added to the score, here to the difference of two: it is not swallowed."""
        scores, targets = np.array([[2.0**60, 2.0**60]]), np.array([0.0])
        assert original_hinge(scores, targets, smooth)[0] == 0.0
        assert our_hinge(scores, targets, smooth)[0] == (0.5 if smooth else 1.0)


ALIG_SETTINGS = ({"max_lr": 0.1, "momentum": 0.0},) * 3
ALIG_MOMENTUM = (
    {"max_lr": 0.1, "momentum": 0.9},
    {"max_lr": 0.1, "momentum": 0.5},
    {"max_lr": 0.1, "momentum": 0.0},
)
# None of them negative: see below.
ALIG_SHARES = (0.0, 1e-3, 0.02, 0.1, 1.0)


class TestAliG:
    @pytest.mark.parametrize("path", TORCH_PATHS)
    @pytest.mark.parametrize("settings", [ALIG_SETTINGS, ALIG_MOMENTUM], ids=["plain", "momentum"])
    def test_trajectory(self, path: str, settings: tuple[dict[str, Any], ...]) -> None:
        """One max_lr, no weight decay: the same, momentum included, if eps is max_lr times theirs.

        Here ηγ = ηℓ / (η‖g‖² + ε) = ℓ / (‖g‖² + ε/η).
        """
        theirs, ours = start(torch.float64, settings)
        expected = OriginalAliG(theirs, eps=1e-3)
        optimizer = DFW(renamed(ours, "max_lr"), eps=0.1 * 1e-3, **PATHS[path])
        groups: Any = optimizer.param_groups
        kinds = set()
        for _, loss, gradients in walk(theirs, ALIG_SHARES):
            give(groups, gradients)
            expected.step(loss, gradients)
            optimizer.step(loss=loss)
            step_size = theirs[0]["step_size"]
            assert 0.1 * float(optimizer.gamma) == pytest.approx(step_size, rel=1e-12)
            assert_same_weights(groups, theirs, **EXACT)
            kinds.add("zero" if step_size == 0 else "full" if step_size == 0.1 else "between")
        assert kinds == {"zero", "between", "full"}

    def test_step_size(self) -> None:
        """min(lr, ℓ / (‖g‖² + ε/lr)), literally."""
        generator = np.random.default_rng(0)
        for lr, eps in itertools.product((0.01, 0.1, 1.0), (0.0, 1e-5, 1e-2)):
            for _ in range(20):
                w, g = generator.normal(0, 1, (2, 6))
                loss = float(generator.exponential(0.3))
                p = Parameter(torch.tensor(w))
                p.grad = torch.tensor(g)
                DFW([p], lr=lr, momentum=0.0, eps=eps).step(loss=loss)
                step = min(lr, loss / (float((g * g).sum()) + eps / lr))
                np.testing.assert_allclose(to_numpy(p), w - step * g, rtol=1e-12, atol=1e-14)

    def test_projection(self) -> None:
        """Theirs at construction and after each step; here by hand, and as a hook of the step."""
        radius = 1.2
        theirs, ours = start(torch.float64, ALIG_MOMENTUM)
        arrays = [w for group in theirs for w in group["params"]]
        params = [p for group in ours for p in group["params"]]
        cut = 0

        def project_arrays() -> None:
            nonlocal cut
            norm = math.sqrt(sum(float((w * w).sum()) for w in arrays))
            if norm > radius:
                cut += 1
                for w in arrays:
                    w *= radius / norm

        @torch.no_grad()
        def project(*_: Any) -> None:
            norm = torch.stack([p.square().sum() for p in params]).sum().sqrt()
            if norm > radius:
                for p in params:
                    p *= radius / norm

        expected = OriginalAliG(theirs, project_arrays)
        project()
        optimizer = DFW(renamed(ours, "max_lr"), eps=0.1 * 1e-5)
        optimizer.register_step_post_hook(project)
        for _, loss, gradients in walk(theirs, ALIG_SHARES):
            give(optimizer.param_groups, gradients)
            expected.step(loss, gradients)
            optimizer.step(loss=loss)
        assert cut > 10
        assert_same_weights(optimizer.param_groups, theirs, **EXACT)

    def test_difference_negative_loss(self) -> None:
        """There the step turns round and climbs; here there is none."""
        theirs, ours = start(torch.float64, ALIG_SETTINGS)
        expected, optimizer = OriginalAliG(theirs), DFW(renamed(ours, "max_lr"))
        _, _, gradients = next(walk(theirs, (1.0,)))
        give(optimizer.param_groups, gradients)
        before = everything(optimizer)[0]
        optimizer.step(loss=-0.5)
        expected.step(-0.5, gradients)
        assert theirs[0]["step_size"] < 0
        assert float(optimizer.gamma) == 0.0
        assert everything(optimizer)[0] == before

    def test_difference_several_learning_rates(self) -> None:
        """There each group has the same unclipped step; here all have the same share of their lr.

        So a group with a small lr takes a small step also where the other one is not at its limit.
        """
        settings = ({"max_lr": 0.5, "momentum": 0.0}, {"max_lr": 0.05, "momentum": 0.0})
        theirs, ours = start(torch.float64, settings)
        expected, optimizer = OriginalAliG(theirs, eps=0.0), DFW(renamed(ours, "max_lr"), eps=0.0)
        _, _, gradients = next(walk(theirs, (1.0,)))
        give(optimizer.param_groups, gradients)
        squares = [sum(float((g * g).sum()) for g in row if g is not None) for row in gradients]
        loss = 0.01 * sum(squares)
        expected.step(loss, gradients)
        optimizer.step(loss=loss)
        assert [group["step_size"] for group in theirs] == pytest.approx([0.01, 0.01])
        gamma = loss / (0.5 * squares[0] + 0.05 * squares[1])
        assert float(optimizer.gamma) == pytest.approx(gamma)
        assert 0.05 * gamma < 0.01 < 0.5 * gamma

    def test_difference_adjusted_momentum(self) -> None:
        """The same while the step size is; else theirs rescales what is under way."""
        for shares, same in (((1.0,), True), (ALIG_SHARES, False)):
            theirs, ours = start(torch.float64, ALIG_MOMENTUM)
            expected = OriginalAliG(theirs, adjusted_momentum=True)
            optimizer = DFW(renamed(ours, "max_lr"), eps=0.1 * 1e-5)
            for _, loss, gradients in walk(theirs, shares):
                give(optimizer.param_groups, gradients)
                expected.step(10 * loss, gradients)
                optimizer.step(loss=10 * loss)
            pairs = [
                (to_numpy(p), w)
                for group, other in zip(optimizer.param_groups, theirs, strict=True)
                for p, w in zip(group["params"], other["params"], strict=True)
                if group["momentum"]
            ]
            assert all(np.allclose(p, w, rtol=1e-10, atol=1e-12) for p, w in pairs) == same


class TestSGD:
    @pytest.mark.parametrize("path", TORCH_PATHS)
    def test_full_steps_are_those_of_nesterov_sgd(self, path: str) -> None:
        """γ = 1, as for a loss large for its gradient: SGD(nesterov=True), decay included."""
        _, ours = start(torch.float64, DFW_SETTINGS)
        groups = renamed(ours, "eta")
        others = copy.deepcopy(groups)
        for group in others:
            group["nesterov"] = group["momentum"] > 0
        optimizer, sgd = DFW(groups, **PATHS[path]), SGD(others)
        _, theirs = start(torch.float64, DFW_SETTINGS)
        arrays = [{"params": [to_numpy(p) for p in group["params"]]} for group in theirs]
        for _, loss, gradients in walk(arrays, (1.0,)):
            for opt in (optimizer, sgd):
                give(opt.param_groups, gradients)
            optimizer.step(loss=100.0 + loss)
            sgd.step()
            assert float(optimizer.gamma) == 1.0
        for group, other in zip(optimizer.param_groups, sgd.param_groups, strict=True):
            for p, q in zip(group["params"], other["params"], strict=True):
                torch.testing.assert_close(p, q, **EXACT)

    @pytest.mark.parametrize("other", [SGD, Adam])
    def test_one_line_changes(self, other: Any) -> None:
        """Groups, settings of groups and the loop stay, but for the loss and settings of Adam's."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        x = torch.randn(64, 4)
        labels = (x @ torch.randn(4, 3)).argmax(1)
        groups = [
            {"params": [model[0].weight, model[2].weight], "weight_decay": 1e-4},
            {"params": [model[0].bias, model[2].bias], "lr": 0.05},
        ]
        losses = {}
        for name, make in (("theirs", other), ("ours", DFW)):
            twin, its_groups = copy.deepcopy((model, groups))
            optimizer: Any = make(its_groups, lr=0.1)
            for _ in range(40):
                loss = nn.functional.cross_entropy(twin(x), labels)
                optimizer.zero_grad()
                loss.backward()
                if name == "theirs":
                    optimizer.step()
                else:
                    optimizer.step(loss=loss)
            losses[name] = float(loss.detach())
        assert losses["ours"] < 0.5
        with pytest.raises(ValueError, match="of another optimizer"):
            DFW(groups).load_state_dict(other(groups, lr=0.1).state_dict())


class TestParq:
    """What the settings of its groups stand for; no step of it is the same, nor meant to be."""

    def model(self) -> Any:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2)
        )

    def test_one_bit_per_channel(self) -> None:
        """`LSBQuantizer`, 1 bit, quant_per_channel=True: our binary weights, with sign(0) = +1."""
        model = self.model()
        with torch.no_grad():
            model[1].weight[0, 0, 0, 0] = 0.0
        before = [to_numpy(model[index].weight) for index in (1, 3)]
        ProjectedDFW(param_groups(model))
        for index, w in zip((1, 3), before, strict=True):
            rows = w.reshape(len(w), -1)
            level = np.abs(rows).mean(axis=1, keepdims=True)
            quantized = np.where(rows >= 0, level, -level).reshape(w.shape)
            np.testing.assert_allclose(to_numpy(model[index].weight), quantized, rtol=1e-6)

    def test_latents_in_the_scale_of_the_layer(self) -> None:
        """Their "latent" is the float weight; ours has its largest magnitude divided out."""
        for optimizer_class in (ProjectedDFW, TernaryDFW):
            model = self.model()
            before = model[3].weight.detach().clone()
            optimizer = optimizer_class(param_groups(model))
            state = optimizer.state[model[3].weight]
            torch.testing.assert_close(state["latent"] * state["unit"], before)

    def test_warm_up(self) -> None:
        """`warmup_steps`: some steps of DFW in float, then an optimizer that quantizes."""
        model = self.model()
        x, labels = torch.randn(32, 1, 6, 6), torch.arange(32) % 2

        def fit(optimizer: Any, steps: int) -> float:
            for _ in range(steps):
                loss: Tensor = nn.functional.cross_entropy(model(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step(loss=loss)
            return float(loss.detach())

        fit(DFW(model.parameters()), 10)
        floats = model[3].weight.detach().clone()
        optimizer = ProjectedDFW(param_groups(model))
        signs = torch.where(floats >= 0, 1.0, -1.0)
        assert same_bits(torch.where(model[3].weight.detach() >= 0, 1.0, -1.0), signs)
        first = fit(optimizer, 1)
        assert fit(optimizer, 30) < first
