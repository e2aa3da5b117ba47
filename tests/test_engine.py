"""DeepSpeed at every stage against plain torch: weights, their average, norms of the gradient and by block."""

import pytest

from models.config import InputError
from pipeline.training.config import EngineConfig
from pipeline.training.engine import check_engine
from tests import train_factory
from tests.ranks_engine import CASES

# fp32: another order of summing, which Adam's division enlarges. bf16: forward and backward round to
# 3 digits, so steps of lr 1e-3 may differ in sign where a gradient is near zero: 5 steps x 2 x 1e-3.
TOLERANCE = {"fp32": (1e-4, 1e-4), "bf16": (1e-2, 5e-2)}


@pytest.mark.distributed
def test_every_stage_precision_optimizer_and_offload_trains_as_plain_torch_does():
    lines = train_factory.results("engine", "tests.ranks_engine")
    assert [tuple(line[:4]) for line in lines] == [tuple(map(str, case)) for case in CASES]
    for *case, raw, ema, norm, blocks in lines:
        weights, gradient = TOLERANCE[case[1]]
        if case[2] == "muon":  # orthogonalises in bf16 whatever the precision
            weights = max(weights, 5e-4)
        assert float(raw) <= weights, case
        assert float(ema) <= weights, case
        assert float(norm) <= gradient, case
        # Norms by block of gradient, update, weights and EMA distance.
        assert float(blocks) <= {"fp32": 1e-4, "bf16": 0.1}[case[1]], case


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "ranks", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)], ids=len
)
def test_muons_losses_are_the_same_at_every_stage_and_number_of_ranks(ranks):
    runs = {
        (number, stage): [float(loss) for loss in losses]
        for number in ranks
        for stage, *losses in train_factory.results(
            "losses", "tests.ranks_engine", "losses", ranks=number
        )
    }
    expected = runs[1, "0"]
    assert len(expected) == 50
    assert expected[-1] < 0.8 * expected[0]
    for case, losses in runs.items():
        assert losses == pytest.approx(expected, rel=1e-4), case


def test_what_cannot_be_combined_is_refused_with_the_remedy():
    with pytest.raises(InputError, match=r"summed in bf16.*zero_stage=1"):
        check_engine(EngineConfig(zero_stage=0, precision="bf16"), 2)
    check_engine(EngineConfig(zero_stage=0, precision="bf16"), 1)
    check_engine(EngineConfig(zero_stage=1, precision="bf16"), 2)
    with pytest.raises(ValueError, match="offload_parameters: no effect with zero_stage 2"):
        EngineConfig(zero_stage=2, offload_parameters="cpu")
