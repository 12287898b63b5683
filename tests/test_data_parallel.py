"""Data parallelism by real processes: one loss for all, and nothing else to talk about.

Two and four processes train under DistributedDataParallel on shards of different sizes; see
data_parallel_ranks.py for what they do.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data_parallel_ranks
import pytest
import torch
import torch.distributed as dist
from data_parallel_ranks import BAD, BAD_STEPS, FEW, LR, STEPS, Training, large_batches
from helpers import KINDS, MAIN_KINDS, Kind, everything, fingerprint, make_params, train
from ranks import Results, World, flat, launch
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from dfw_opt import DFW

THREE = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
TOLERANCE = 1e-10
"""Of float64. A change in the last digit, 1e-16, grows some 4000 times in these 50 steps. A sum
over other samples, or a loss that is not averaged, is off in the first digits."""

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    return launch(data_parallel_ranks.__file__, request.param, folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """The joined batch in one process, which has no process group."""
    assert not dist.is_initialized()
    return {str(kind): Training(kind, World()).run(STEPS).outcome() for kind in KINDS}


def assert_close(values: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(values, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS, ids=str)
class TestJoinedBatch:
    def test_ranks_hold_the_same_bits(self, results: Results, kind: Kind) -> None:
        """After every one of 50 steps: parameters, latents, scales, momentum, γ."""
        first, *others = (rank[str(kind)] for rank in results["joined_batch"])
        assert len(set(first["digests"])) == STEPS
        for other in others:
            assert other["digests"] == first["digests"]
            assert fingerprint(other["values"]) == fingerprint(first["values"])
            assert other["losses"] != first["losses"]  # each has its own

    def test_equal_to_one_process(
        self, results: Results, alone: dict[str, dict[str, Any]], kind: Kind
    ) -> None:
        expected = alone[str(kind)]
        for rank in results["joined_batch"]:
            run = rank[str(kind)]
            assert run["skipped"] == expected["skipped"] == 0
            assert_close(run["values"], expected["values"])
            assert run["gammas"] == pytest.approx(expected["gammas"], rel=TOLERANCE)

    def test_the_loss_counts(self, alone: dict[str, dict[str, Any]], kind: Kind) -> None:
        """These trainings could tell a wrong loss: γ depends on it in many of their steps."""
        assert sum(0 < gamma < 1 for gamma in alone[str(kind)]["gammas"]) >= STEPS // 10


def test_the_exact_search_counts(alone: dict[str, dict[str, Any]]) -> None:
    """In the same trainings, it comes to another γ than the closed form does."""
    for name in ("binary", "ternary"):
        exact, closed = alone[name]["gammas"], alone[f"{name}_closed_form"]["gammas"]
        assert exact != pytest.approx(closed, rel=1e-3)


def test_every_type_and_implementation(results: Results) -> None:
    """float32 by all three, and bfloat16: the same bits on all ranks after every step."""
    first, *others = results["every_path"]
    assert {len(set(digests)) for digests in first.values()} == {STEPS, FEW}
    assert all(other == first for other in others)


@THREE
def test_bad_numbers_on_one_rank(results: Results, kind: Kind) -> None:
    """NaN input, an infinite gradient, a NaN or infinite loss: all ranks skip, and then go on."""
    first, *others = (rank[str(kind)] for rank in results["bad_numbers"])
    for other in others:
        assert other["all"]["digests"] == first["all"]["digests"]
    skipped = [step for step, gamma in enumerate(first["all"]["gammas"]) if math.isnan(gamma)]
    assert tuple(skipped) == BAD
    for run in (first, *others):
        assert run["all"]["skipped"] == len(BAD)
        assert run["good"]["skipped"] == 0
        assert len(run["good"]["gammas"]) == BAD_STEPS - len(BAD)
        # As if those steps had not been.
        assert run["all"]["end"] == run["good"]["end"]
    assert sum(math.isfinite(loss) for loss in first["all"]["losses"]) > BAD_STEPS - len(BAD)


@THREE
def test_unwanted(results: Results, kind: Kind) -> None:
    """``process_group=None``: each rank trains for itself, however many steps it takes."""
    for rank, result in enumerate(results["rank_local"]):
        training = Training(kind, World())
        for step in range(2 + 3 * rank):
            training.step(training.backward(step + 100 * rank))
        assert result[str(kind)]["calls"] == []
        assert result[str(kind)]["digests"] == training.digests


def test_without_it_the_ranks_drift_apart(results: Results) -> None:
    """Which shows that the other tests would see a loss that is not averaged."""
    runs = results["drift"]
    assert all(run["calls"] == [] for run in runs)
    assert len({run["digests"][-1] for run in runs}) == len(runs)


@THREE
def test_subgroups(results: Results, kind: Kind) -> None:
    """The loss is averaged over the given group, and over no other ranks."""
    runs = [rank[str(kind)] for rank in results["subgroups"]]
    size = len(runs) // 2
    for half in range(2):
        training = Training(kind, World())
        for step in range(8):
            training.step(training.backward(step + 100 * half))
        mine = runs[half * size : (half + 1) * size]
        for run in mine:
            assert run["digests"] == mine[0]["digests"]
            assert_close(run["values"], training.outcome()["values"])
            assert run["gammas"] == pytest.approx(training.gammas, rel=TOLERANCE)


@THREE
def test_accumulation(results: Results, kind: Kind) -> None:
    """Micro-batches under ``no_sync`` are the large batch."""
    expected = large_batches(kind)
    assert any(0 < gamma < 1 for gamma in expected["gammas"])
    for rank in results["accumulation"]:
        assert_close(rank[str(kind)]["values"], expected["values"])
        assert rank[str(kind)]["gammas"] == pytest.approx(expected["gammas"], rel=TOLERANCE)


def test_communication(results: Results) -> None:
    """A step sends one number, once, also when it is skipped."""
    for rank in results["communication"]:
        for name, steps in rank.items():
            assert len(steps) == 4
            for calls in steps:
                assert [elements for _, elements, _ in calls] == [1], name
                assert "reduce" in calls[0][0]


def test_ways_to_give_the_loss(results: Results) -> None:
    for rank in results["ways_to_give_the_loss"]:
        for way, digests in rank.items():
            assert digests == rank["tensor"], way
    first, *others = results["ways_to_give_the_loss"]
    assert all(other == first for other in others)


def test_watched_loss(results: Results) -> None:
    """With a bare ``step()`` what was watched is averaged as a given loss is."""
    first, *others = results["watched"]
    assert first["watched"] == first["given"]
    assert all(other == first for other in others)


# --------------------------------------------------------------------------------------------------
# In one process
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    store = FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def trained(kind: Kind, **settings: Any) -> Any:
    params = make_params()
    optimizer = kind.make(params, lr=LR, **settings)
    train(optimizer, params, 6)
    return everything(optimizer), fingerprint(optimizer.gamma)


@THREE
def test_no_process_group(kind: Kind) -> None:
    """Where torch.distributed was not started, the default is no different from ``None``."""
    assert not dist.is_initialized()
    assert (
        trained(kind) == trained(kind, process_group=None) == trained(kind, process_group="world")
    )


@THREE
def test_a_group_of_one(kind: Kind, group_of_one: None) -> None:
    assert trained(kind) == trained(kind, process_group=None)
    assert trained(kind) == trained(kind, process_group=dist.group.WORLD)


def test_started_and_ended_between_steps(tmp_path: Path) -> None:
    """What counts is whether there is a process group at a step."""
    params = make_params()
    optimizer = DFW(params, lr=LR)
    train(optimizer, params, 2)
    store = FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        train(optimizer, params, 2, seed=1)
    finally:
        dist.destroy_process_group()
    train(optimizer, params, 2, seed=2)

    others = make_params()
    other = DFW(others, lr=LR, process_group=None)
    for seed in range(3):
        train(other, others, 2, seed=seed)
    assert everything(optimizer) == everything(other)


@THREE
@pytest.mark.parametrize("wrong", ["gloo", "World", "", 0, True, False, [0, 1], {}], ids=repr)
def test_wrong_values(kind: Kind, wrong: Any) -> None:
    params = make_params()
    before = fingerprint([p.detach() for p in params])
    with pytest.raises((TypeError, ValueError), match="process_group"):
        kind.make(params, process_group=wrong)
    assert fingerprint([p.detach() for p in params]) == before


def test_a_group_that_this_rank_is_not_in() -> None:
    """It is no group, but what ``new_group`` returns there."""
    outside: Any = dist.GroupMember.NON_GROUP_MEMBER
    with pytest.raises((TypeError, ValueError), match="process_group"):
        DFW(make_params(), process_group=outside)


def test_kept_beside_the_groups(group_of_one: None) -> None:
    """A process group is nothing that a checkpoint could hold."""
    assert dist.group.WORLD is not None
    for value in ("world", None, dist.group.WORLD):
        params = make_params()
        optimizer = DFW(params, process_group=value)
        assert optimizer.process_group is value
        assert "process_group" not in optimizer.defaults
        assert all("process_group" not in group for group in optimizer.param_groups)
        train(optimizer, params, 1)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = DFW(make_params(), process_group=None)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        assert loaded.process_group is None


@pytest.mark.parametrize("value", ["world", None])
def test_copies_keep_it(value: Any) -> None:
    optimizer = DFW(make_params(), process_group=value)
    assert copy.deepcopy(optimizer).process_group == value
    assert pickle.loads(pickle.dumps(optimizer)).process_group == value


def test_flat_names_everything() -> None:
    """The comparisons above would miss a tensor that it leaves out."""
    params = make_params()
    optimizer = MAIN_KINDS[2].make(params)
    train(optimizer, params, 1)
    tensors = sum(len(optimizer.state[p]) for p in params) + len(params)
    assert len(flat(optimizer)) == tensors > 10
