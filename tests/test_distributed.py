"""Several processes are one: DDP, FSDP2, HSDP and tensor parallelism, against one process.

Real processes over gloo, two and four; ranks.py has what they do. In float64, so that "equal" is
sharp: the order of a sum over ranks changes the last digit, 1e-16, which grows by some thousands in
these few steps; a rank that is left out, or counted twice, is off in the first digits.
"""

from __future__ import annotations

import functools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from helpers import fingerprint
from kinds import ALL_KINDS, KINDS, MAIN, Kind
from ranks import QUANTIZED, SAVED, SIZES, SPECTRAL, STEPS, Results, World, launch

TOLERANCE = 1e-10
ALONE = World()

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # of a save by one process
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Checkpoints of one process, and where its trainings came to."""
    folder = tmp_path_factory.mktemp("one")
    return folder, {str(kind): ranks.save(kind, ALONE, folder) for kind in SAVED}


@pytest.fixture(scope="module")
def pair(one: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(one[0], folder / "others")
    return launch(2, folder)


@pytest.fixture(scope="module")
def four(pair: Results, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(pair.folder / "saved", folder / "others")
    return launch(4, folder)


@pytest.fixture(params=["pair", "four"])
def results(request: pytest.FixtureRequest) -> Results:
    found: Results = request.getfixturevalue(request.param)
    return found


@functools.cache
def expected(kind: Kind, layout: str) -> dict[str, Any]:
    """The same training in one process, on the joined batch."""
    if layout not in ("rows", "tensor"):
        return expected(kind, "tensor" if layout == "both" else "rows")
    return ranks.trained(kind, ALONE, layout)


def assert_equal_runs(
    by_rank: list[dict[str, Any]], wanted: dict[str, Any], *, exact: bool = True
) -> None:
    """To one process up to rounding, to each other to the bit; and weights are Q(latents)."""
    for run in by_rank:
        assert run["skipped"] == wanted["skipped"] == 0
        assert run["exact"] or not exact
        assert run["gammas"] == pytest.approx(wanted["gammas"], rel=TOLERANCE)
        assert fingerprint(run["values"]) == fingerprint(by_rank[0]["values"])
        assert run["values"].keys() == wanted["values"].keys()
        for name, value in run["values"].items():
            one = wanted["values"][name]
            assert (value.shape, value.dtype) == (one.shape, one.dtype), name
            assert torch.allclose(value, one, TOLERANCE, TOLERANCE, equal_nan=True), name


class TestEqualToOneProcess:
    @ALL_KINDS
    def test_data_parallel(self, pair: Results, kind: Kind) -> None:
        """Each rank passes its own loss, and after every step all hold the same bits."""
        runs = pair.of("ddp", kind)
        assert_equal_runs(runs, expected(kind, "ddp"))
        assert len(set(runs[0]["digests"])) == STEPS
        assert runs[0]["digests"] == runs[1]["digests"]

    @ALL_KINDS
    def test_fully_shard(self, pair: Results, kind: Kind) -> None:
        """Rows that the ranks do not divide."""
        assert_equal_runs(pair.of("rows", kind), expected(kind, "rows"))

    @MAIN
    @pytest.mark.parametrize(
        ("results", "layout"),
        [("pair", x) for x in ("columns", "tensor")]
        + [("four", x) for x in ("rows", "hybrid", "both")],
        indirect=["results"],
    )
    def test_layouts(self, results: Results, layout: str, kind: Kind) -> None:
        """Columns; tensor parallelism; rows of which the last rank has none; HSDP, where a sum over
        all ranks would count everything twice; and FSDP2 with tensor parallelism: two meshes.
        """
        runs = results.of(layout, kind)
        # The scale of a channel that is cut is a mean over ranks, with a last digit of its own.
        assert_equal_runs(runs, expected(kind, layout), exact=layout != "columns")

    @ALL_KINDS
    def test_the_sums_count(self, kind: Kind) -> None:
        """These trainings would tell: γ depends on the loss and all sums in most of their steps."""
        gammas = expected(kind, "rows")["gammas"]
        assert sum(0 < gamma < 1 for gamma in gammas) > STEPS / 2
        if not str(kind).startswith("dfw") and kind.norm == "euclidean":
            closed = f"{str(kind).split('-')[0]}_closed_form-euclidean"
            for other in (k for k in KINDS if str(k) == closed):
                assert expected(other, "rows")["gammas"] != pytest.approx(gammas, rel=1e-3)

    @MAIN
    def test_other_loops(self, pair: Results, kind: Kind) -> None:
        """Gradients clipped by clip_grad_norm_, a layer frozen and thawed, one without gradient."""
        assert_equal_runs(pair.of("clipped", kind), ranks.clipped(kind, ALONE))

    @MAIN
    def test_process_group(self, pair: Results, kind: Kind) -> None:
        """A given group averages as all ranks do. With None a rank is alone, unless it shares
        parameters with others.
        """
        steps = [2, 3]
        for rank, of_pair in enumerate(pair.of("groups", kind)):
            grouped, calls, alone, cut = of_pair
            assert grouped == pytest.approx(expected(kind, "ddp")["gammas"], rel=TOLERANCE)
            assert calls == 0
            assert alone == expected(kind, "ddp")["gammas"][: steps[rank]]
            assert cut == pytest.approx(expected(kind, "rows")["gammas"], rel=TOLERANCE)

    @MAIN
    def test_mixed_precision(self, pair: Results, kind: Kind) -> None:
        """Computed in bfloat16: state and steps are float32, and alike. γ of the first step is that
        of float64, to the 2⁻⁸ of a bfloat16 some ten times over.
        """
        runs = pair.of("half_precision", kind)
        assert fingerprint(runs[0]["values"]) == fingerprint(runs[1]["values"])
        assert runs[0]["dtypes"] == ["torch.float32"]
        assert runs[0]["exact"]
        assert runs[0]["gammas"][0] == pytest.approx(expected(kind, "rows")["gammas"][0], rel=0.05)

    @MAIN
    def test_averages(self, pair: Results, kind: Kind) -> None:
        """Of parallel tensors: those of one process. What FSDP2 has cut cannot be copied."""
        alone = ranks.averages(kind, ALONE)
        for rank in pair.of("averages", kind):
            assert "FSDP does not support deepcopy" in rank["rows"]
            for mine, one in zip(rank["tensor"], alone["tensor"], strict=True):
                assert torch.allclose(mine, one, TOLERANCE, TOLERANCE)


class TestWhatOneRankAloneKnows:
    @MAIN
    @pytest.mark.parametrize(
        ("results", "layout"),
        [("pair", x) for x in ("ddp", "rows", "tensor")] + [("four", x) for x in ("ddp", "rows")],
        indirect=["results"],
    )
    def test_bad_numbers(self, results: Results, layout: str, kind: Kind) -> None:
        """A NaN or infinite loss, one bad element of a gradient: all skip, and go on alike."""
        for same_end, skipped, gammas in (r[layout] for r in results.of("bad_numbers", kind)):
            assert [i for i, gamma in enumerate(gammas) if math.isnan(gamma)] == [*ranks.BAD]
            assert skipped == len(ranks.BAD)
            assert same_end  # as if those steps had not been

    @pytest.mark.parametrize("kind", QUANTIZED, ids=str)
    def test_written_weights(self, pair: Results, kind: Kind) -> None:
        """In place, by one rank, after the gradient was made: latents know nothing of it."""
        for untouched, overwritten in pair.of("written", kind):
            assert overwritten == untouched

    @MAIN
    @pytest.mark.parametrize("what", ["nan", "lacks", "columns", "model"])
    def test_refusals(self, pair: Results, kind: Kind, what: str) -> None:
        """All ranks refuse what one has to, and nothing changes."""
        if what == "model" and not kind.quantized:
            pytest.skip("floats may start with any numbers")
        reasons = {
            "nan": ["another rank cannot load this checkpoint", "NaN or infinite values"],
            "lacks": ["another rank cannot load this checkpoint", "both have ['more']"],
            "columns": ["set_optimizer_state_dict", "set_optimizer_state_dict"],
            "model": ["holds NaN or infinity", "holds NaN or infinity"],
        }
        for rank, reason in zip(pair.of("refusals", kind), reasons[what], strict=True):
            message, unchanged = rank[what]
            assert reason in message
            assert unchanged

    @MAIN
    def test_meta(self, pair: Results, kind: Kind) -> None:
        """Made real before the first step: DFW may be there already; what quantizes says no."""
        for rank in pair.of("no_values", kind):
            before, after = rank["before"], rank["after"]
            if kind.quantized:
                assert "on the meta device" in before
                assert "before the optimizer" in before
            else:
                assert fingerprint(before) == fingerprint(after)
            assert all(bool(torch.isfinite(p).all()) for p in after)


class TestWhatIsSent:
    """Five, ten, or five larger layers and a last one, all alike; the numbers are those of the
    documentation.
    """

    # Of one step: for two shapes of matrices and of vectors, there and back (a vector is whole on
    # all, who need no answer); for each shape of quantized tensors; and for the search.
    LARGE = {"spectral": 6, "euclidean": 0}  # noqa: RUF012
    BY_SHAPE = {"dfw": 0, "binary": 2, "uniform": 1, "ternary": 9}  # noqa: RUF012
    SEARCH = 17

    @pytest.mark.parametrize("kind", ranks.COUNTED, ids=str)
    def test_data_parallel(self, pair: Results, kind: Kind) -> None:
        """One number, the loss."""
        for rank in pair.of("communication", kind):
            calls, _ = rank["ddp 16 5"]
            assert calls == [("allreduce_", 4)]

    @pytest.mark.parametrize("kind", ranks.COUNTED, ids=str)
    def test_messages(self, pair: Results, kind: Kind) -> None:
        """They are as many for more or larger tensors of the same two shapes; and but for those
        that carry the matrices they are as small as a few numbers a tensor.
        """
        name = str(kind).split("-")[0].split("_")[0]
        searched = kind.norm == "euclidean" and "dfw" not in str(kind) and "closed" not in str(kind)
        number = 3 + self.LARGE[kind.norm] + 2 * self.BY_SHAPE[name] + self.SEARCH * searched
        for rank in pair.of("communication", kind):
            for width, depth in SIZES:
                calls = rank[f"rows {width} {depth}"][0]
                assert len(calls) <= number
                whole = [size for name, size in calls if "gather" in name]
                rest = [size for name, size in calls if "gather" not in name]
                assert max(rest) <= max(8 * 4, 8 * depth)  # counts of weights are int64
                # Each way what a rank holds of the parameters or computes of them, float32.
                elements = depth * width * (width + 1) + 8 * (width + 1)
                assert len(whole) == self.LARGE[kind.norm]
                assert max(whole, default=0) <= 4 * (elements / 2 + width * width)

    @pytest.mark.parametrize("kind", SPECTRAL, ids=str)
    def test_each_matrix_once(self, results: Results, kind: Kind) -> None:
        """By one rank, and by none of them more than its share."""
        for width, depth in SIZES:
            runs = [rank[f"rows {width} {depth}"][1] for rank in results.of("communication", kind)]
            by_rank = [[tuple(shape) for shape in shapes] for shapes in runs]
            square = [shapes.count((width, width)) for shapes in by_rank]
            assert sum(square) == depth
            assert max(square) == math.ceil(depth / len(runs))
            assert sum(map(len, by_rank)) == depth + 1
        for rank in results.of("communication", kind):  # where all ranks hold all
            assert len(rank["ddp 16 5"][1]) == 6

    def test_directions(self, results: Results) -> None:
        """Of batches that the ranks do not divide, some with nothing, cut in all dimensions."""
        for rank in results.of("directions", SPECTRAL[0]):
            assert not rank

    @MAIN
    def test_placements(self, results: Results, kind: Kind) -> None:
        """State is cut as its parameter is, and no view of more; numbers are on all ranks."""
        assert not any(results.of("placements", kind))


class TestCheckpoints:
    @pytest.mark.parametrize("kind", SAVED, ids=str)
    def test_another_number_of_ranks(self, results: Results, one: Any, kind: Kind) -> None:
        """From one to two, and from two to four: goes on as one that never stopped."""
        self.check(results.of("loaded", kind), one[1][str(kind)])

    @pytest.mark.parametrize("kind", SAVED, ids=str)
    def test_one_process(self, pair: Results, one: Any, kind: Kind) -> None:
        self.check([ranks.load(kind, ALONE, pair.folder / "saved")], one[1][str(kind)])

    @pytest.mark.parametrize("kind", SAVED, ids=str)
    def test_saving(self, pair: Results, one: Any, kind: Kind) -> None:
        """Changes nothing, not even where torch makes a step to see what state there is."""
        assert_equal_runs(pair.of("saved", kind), one[1][str(kind)])
        assert all(rank["probed"] for rank in pair.of("saved", kind))

    def check(self, by_rank: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
        assert "cut" in by_rank[0]
        for way in by_rank[0]:
            runs = [rank[way] for rank in by_rank]
            assert_equal_runs(runs, wanted | {"gammas": wanted["gammas"][ranks.HALF :]})
