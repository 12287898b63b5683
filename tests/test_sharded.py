"""Sharded weights by real processes: FSDP2 and tensor parallelism are one process on N machines.

Two and four processes train models whose parameters are DTensors; see sharded_ranks.py for what
they do. In float64, so that "equal" can be sharp.
"""

from __future__ import annotations

import functools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import sharded_ranks
import torch
import torch.distributed as dist
from helpers import KINDS, MAIN_KINDS, Kind, fingerprint, relaxed, same_bits
from ranks import Results, World, launch
from sharded_ranks import (
    BAD,
    BAD_STEPS,
    FALL,
    FOUR,
    FOUR_SETTINGS,
    HALF,
    ON_FOUR,
    SAVED,
    SETTINGS,
    STEPS,
    WITH_STATE,
    averaged_by_the_caller,
    clipped,
    frozen,
    smaller_box,
    train_all,
)
from torch import Tensor

EACH = pytest.mark.parametrize("kind", FOUR, ids=str)
TOLERANCE = 1e-10
"""Of float64. The order of a sum over shards changes the last digit, 1e-16, and that grows some
thousand times in these 20 steps. A shard that is left out of a sum, or counted twice, is off in the
first digits."""

ALONE = World()

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # of a save by one process
]

Runs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runs]:
    """Checkpoints of one process, and where its trainings came to."""
    folder = tmp_path_factory.mktemp("one")
    return folder, sharded_ranks.save(ALONE, folder)


@pytest.fixture(scope="module")
def two(one: tuple[Path, Runs], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(one[0], folder / "others")
    (folder / "saved").mkdir()
    return folder / "saved", launch(sharded_ranks.__file__, 2, folder)


@pytest.fixture(scope="module")
def four(
    two: tuple[Path, Results], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(two[0], folder / "others")
    (folder / "saved").mkdir()
    return folder / "saved", launch(sharded_ranks.__file__, 4, folder)


@pytest.fixture(params=["two", "four"])
def results(request: pytest.FixtureRequest) -> Results:
    found: tuple[Path, Results] = request.getfixturevalue(request.param)
    return found[1]


@pytest.fixture
def pair(two: tuple[Path, Results]) -> Results:
    """Of what only two ranks do."""
    return two[1]


@functools.cache
def expected(layout: str, name: str) -> dict[str, Any]:
    """The same training, in one process, on the joined batch."""
    assert not dist.is_initialized()
    names = {name: (SETTINGS if layout == "rows" else FOUR_SETTINGS)[name]}
    result: dict[str, Any] = train_all(names, layout, ALONE)[name]
    return result


def assert_equal_runs(by_rank: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    """To one process up to rounding, and to each other to the bit."""
    for run in by_rank:
        assert run["skipped"] == wanted["skipped"]
        assert_close(run["values"], wanted["values"])
        assert run["gammas"] == pytest.approx(wanted["gammas"], rel=TOLERANCE, nan_ok=True)
        assert fingerprint(run["values"]) == fingerprint(by_rank[0]["values"])
        assert fingerprint(run["gammas"]) == fingerprint(by_rank[0]["gammas"])


def assert_close(values: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert values.keys() == wanted.keys()
    for name, value in values.items():
        assert (value.shape, value.dtype) == (wanted[name].shape, wanted[name].dtype), name
        close = torch.allclose(value, wanted[name], rtol=TOLERANCE, atol=TOLERANCE)
        assert close, f"{name}: off by {(value - wanted[name]).abs().max()}"


def assert_quantized(values: dict[str, Tensor], theta: float = 0.0) -> None:
    """The parameters are what the state says, to the bit; and there are some."""
    latents = [name.removesuffix(".latent") for name in values if name.endswith(".latent")]
    assert len(latents) >= 2
    for i in latents:
        state = {
            name.removeprefix(f"{i}."): value
            for name, value in values.items()
            if name.startswith(f"{i}.")
        }
        quantizer = "binary" if "scale" in state else "ternary"
        wanted = relaxed(state, {"quantizer": quantizer, "relaxation": theta})
        assert same_bits(values[i], wanted)


class TestEqualToOneProcess:
    @pytest.mark.parametrize(
        ("results", "name"),
        [("two", name) for name in SETTINGS] + [("four", name) for name in ON_FOUR],
        indirect=["results"],
    )
    def test_rows(self, results: Results, name: str) -> None:
        """FSDP2 as it comes: rows over ranks, where some have none."""
        runs = [rank[name] for rank in results["rows"]]
        assert_equal_runs(runs, expected("rows", name))
        kind, steps, own = SETTINGS[name]
        if kind.quantized:
            theta = own.get("relaxation", 0.0)
            for _ in range(steps):
                theta *= FALL
            assert_quantized(runs[0]["values"], theta)

    @pytest.mark.parametrize("name", FOUR_SETTINGS)
    def test_columns(self, results: Results, name: str) -> None:
        """A channel's scale is a mean over several ranks."""
        assert_equal_runs([r[name] for r in results["columns"]], expected("columns", name))

    @pytest.mark.parametrize("name", FOUR_SETTINGS)
    def test_hybrid(self, four: tuple[Path, Results], name: str) -> None:
        """Two copies of two shards: a sum over all ranks would count everything twice."""
        assert_equal_runs([r[name] for r in four[1]["hybrid"]], expected("hybrid", name))

    @pytest.mark.parametrize("name", FOUR_SETTINGS)
    def test_tensor_parallel(self, pair: Results, name: str) -> None:
        """Rows and columns of two layers; the others are plain, and the same on both ranks."""
        assert_equal_runs([r[name] for r in pair["tensor"]], expected("tensor", name))

    @pytest.mark.parametrize("name", FOUR_SETTINGS)
    def test_sequence_parallel(self, pair: Results, name: str) -> None:
        """A norm that sees a part of each sequence: its gradient is a sum over the ranks."""
        assert_equal_runs([r[name] for r in pair["sequence"]], expected("sequence", name))

    @pytest.mark.parametrize("name", FOUR_SETTINGS)
    def test_both(self, four: tuple[Path, Results], name: str) -> None:
        """FSDP2 and tensor parallelism: one optimizer has parameters on two meshes."""
        runs = [rank[name] for rank in four[1]["tensor_and_rows"]]
        assert_equal_runs(runs, expected("tensor_and_rows", name))

    @pytest.mark.parametrize("name", SETTINGS)
    def test_the_sums_count(self, name: str) -> None:
        """These trainings could tell a wrong sum: γ depends on it in some of their steps."""
        assert sum(0 < gamma < 1 for gamma in expected("rows", name)["gammas"]) >= STEPS // 10

    @EACH
    @pytest.mark.parametrize("training", [clipped, frozen, averaged_by_the_caller])
    def test_other_loops(self, pair: Results, training: Any, kind: Kind) -> None:
        """Clipped gradients, layers without gradients, a loss that the caller has averaged."""
        runs = [rank[str(kind)] for rank in pair[training.__name__]]
        assert_equal_runs(runs, training(kind, ALONE))


@pytest.mark.parametrize("kind", FOUR[1:], ids=str)
def test_smaller_box(results: Results, kind: Kind) -> None:
    """Of which some shards are outside and others are not."""
    assert_equal_runs([r[str(kind)] for r in results["smaller_box"]], smaller_box(kind, ALONE))


@EACH
def test_kernels_that_differ(pair: Results, kind: Kind) -> None:
    """In the last digits: γ is the same to the bit, so no rank leaves a search before another."""
    first, second = (rank[str(kind)]["gammas"] for rank in pair["last_digits"])
    assert any(0 < gamma < 1 for gamma in first)
    assert fingerprint(first) == fingerprint(second)


@EACH
def test_bad_numbers_on_one_rank(results: Results, kind: Kind) -> None:
    """NaN input or loss, one bad element of one shard: all ranks skip, and then go on."""
    for rank in (rank[str(kind)] for rank in results["bad_numbers"]):
        every, good = rank["every"], rank["good"]
        skipped = [step for step, gamma in enumerate(every["gammas"]) if math.isnan(gamma)]
        assert tuple(skipped) == BAD
        assert every["skipped"] == len(BAD)
        assert good["skipped"] == 0
        assert len(good["gammas"]) == BAD_STEPS - len(BAD)
        assert rank["same_end"]  # as if those steps had not been


class TestWhatRanksHold:
    def test_placements(self, results: Results) -> None:
        """State is sharded like its parameter, by no view of more; scalars are on all ranks."""
        for problems in results["placements"]:
            assert problems == []

    @EACH
    def test_memory(self, results: Results, kind: Kind) -> None:
        """Each of N ranks holds an Nth, but for a few scalars."""
        ranks = len(results.by_rank)
        for mine, total, replicated in (rank[str(kind)] for rank in results["memory"]):
            assert mine * ranks == total
            assert total >= 4 * (2 * 256 * 256 + 256 * 8)
            assert replicated <= 3 * 8 * 4  # of three layers, at most eight numbers each

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_communication(self, results: Results, kind: Kind) -> None:
        """It does not grow with the number of elements, of which one model has 40 times as many.

        Only where channels are cut through does each of them send a few numbers.
        """
        for rank in results["communication"]:
            calls = {}
            for place in ("rows", "columns"):
                for width in (32, 256):
                    steps = rank[f"{kind} {place} {width}"]
                    # Each evaluation in a search repeats what was sent before, so that its sizes
                    # are the same however many there are.
                    calls[place, width] = {tuple(call) for step in steps for call in step}
                    for step in steps:
                        assert 1 <= len(step) <= 60
                        channels = 2 * width + 8 if place == "columns" else 0
                        assert sum(elements for _, elements, _ in step) <= 3 * channels + 120
            assert calls["rows", 32] == calls["rows", 256]
            if str(kind).startswith("binary"):
                assert max(n for _, n, _ in calls["columns", 256]) == 256
            else:
                assert calls["columns", 32] == calls["columns", 256]

    def test_the_search_goes_on(self, results: Results) -> None:
        """In that model: a collective for every evaluation would be seen."""
        for rank in results["communication"]:
            for name in ("binary", "ternary"):
                exact = rank[f"{name} rows 256"]
                closed = rank[f"{name}_closed_form rows 256"]
                more = [len(one) - len(other) for one, other in zip(exact, closed, strict=True)]
                assert max(more) >= 3


class TestCheckpoints:
    @pytest.mark.parametrize("name", SAVED)
    def test_saving_changes_nothing(
        self, results: Results, one: tuple[Path, Runs], name: str
    ) -> None:
        assert_equal_runs([rank[name] for rank in results["saved"]], one[1][name])

    @pytest.mark.parametrize("name", SAVED)
    def test_onto_another_number_of_ranks(
        self, results: Results, one: tuple[Path, Runs], name: str
    ) -> None:
        """From one to two, and from two to four: goes on as one that never stopped."""
        for begin in ("new", "half"):
            self.check([rank[begin] for rank in results[f"load {name}"]], one[1][name])

    @pytest.mark.parametrize("broadcast", [False, True])
    @pytest.mark.parametrize("name", WITH_STATE)
    def test_whole_tensors(
        self, results: Results, one: tuple[Path, Runs], name: str, broadcast: bool
    ) -> None:
        """``full_state_dict``: what one rank has read, or each, becomes shards."""
        self.check(results[f"load whole {name} {broadcast}"], one[1][name])

    @pytest.mark.parametrize("source", ["two", "four"])
    @pytest.mark.parametrize("name", SAVED)
    def test_onto_one_process(
        self, request: pytest.FixtureRequest, one: tuple[Path, Runs], source: str, name: str
    ) -> None:
        folder, _ = request.getfixturevalue(source)
        runs = sharded_ranks.load(name, ALONE, folder)
        self.check([runs["new"]], one[1][name])
        self.check([runs["half"]], one[1][name])
        if name in WITH_STATE:
            run = sharded_ranks.load_full(name, ALONE, folder, broadcast=False)
            self.check([run], one[1][name])

    @EACH
    def test_own_shards(self, pair: Results, kind: Kind) -> None:
        """``state_dict`` of the same sharding goes through a file, bit for bit."""
        for rank in (rank[str(kind)] for rank in pair["own_state_dict"]):
            assert rank["came_back"] == rank["stayed"]
            assert len(rank["stayed"]) == HALF

    @pytest.mark.parametrize("name", SAVED)
    def test_a_plain_one(self, pair: Results, one: tuple[Path, Runs], name: str) -> None:
        """Whole tensors in ``load_state_dict``: refused with a word on what to do, or sharded."""
        runs = [rank[name] for rank in pair["plain_state_dict"]]
        assert len({"error" in run for run in runs}) == 1
        if "error" not in runs[0]:
            self.check(runs, one[1][name])
        for run in runs:
            if "error" in run:
                assert run["unchanged"]
                assert "torch.distributed.checkpoint" in run["error"]

    @EACH
    def test_another_layout(self, pair: Results, kind: Kind) -> None:
        for rank in (rank[str(kind)] for rank in pair["another_layout"]):
            assert "sharded otherwise than the parameter" in rank["error"]
            assert "torch.distributed.checkpoint" in rank["error"]
            assert rank["unchanged"]

    @EACH
    def test_nan_in_one_shard(self, pair: Results, kind: Kind) -> None:
        """All ranks refuse; one that did so alone would leave the others waiting."""
        for rank in (rank[str(kind)] for rank in pair["nan_in_a_checkpoint"]):
            assert "momentum_buffer with NaN" in rank["error"]
            assert rank["unchanged"]

    def check(self, runs: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
        for run in runs:
            steps = len(run["gammas"])
            assert steps in (HALF, 2 * HALF)
            gammas = wanted["gammas"][-steps:]
            assert_equal_runs([run], wanted | {"gammas": gammas})

    @EACH
    def test_initialised_by_a_bare_step(self, pair: Results, kind: Kind) -> None:
        for rank in pair["initialised_by_a_bare_step"]:
            assert rank[f"{kind} 0.0"]
            assert rank[f"{kind} 0.9"]


@pytest.mark.parametrize("kind", MAIN_KINDS[1:], ids=str)
def test_nan_in_one_shard_of_a_model(pair: Results, kind: Kind) -> None:
    for rank in (rank[str(kind)] for rank in pair["nan_in_a_model"]):
        assert "holds NaN or infinity" in rank["error"]


@pytest.mark.parametrize("kind", MAIN_KINDS[1:], ids=str)
def test_usual_way(pair: Results, kind: Kind) -> None:
    """param_groups, bfloat16 in the network, weights that are made on the shards: it learns."""
    first, *others = (rank[str(kind)] for rank in pair["usual_way"])
    assert first["losses"][-1] < first["losses"][0] / 2
    assert first["latent"] == "torch.float32"
    assert first["levels"].shape[-1] == 1 if str(kind) == "binary" else len(first["levels"]) <= 3
    assert all(fingerprint(other) == fingerprint(first) for other in others)


@pytest.mark.parametrize("kind", MAIN_KINDS[1:], ids=str)
def test_changed_from_outside(pair: Results, kind: Kind) -> None:
    """Each rank says so; all others here would have raised."""
    for rank in pair["changed_from_outside"]:
        assert len(rank[str(kind)]) == 1
        assert "(9, 20) was changed from outside" in rank[str(kind)][0]


def test_no_gradients(pair: Results) -> None:
    assert pair["gradients_left_out"] == [True] * len(pair.by_rank)
