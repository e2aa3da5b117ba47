"""DeepSpeed at every stage against plain torch: weights, their average, norms of the gradient and by block."""

import pytest

from tests import train_factory

# fp32: another order of summing, which Adam's division enlarges. bf16: forward and backward round to
# 3 digits, so steps of lr 1e-3 may differ in sign where a gradient is near zero: 5 steps x 2 x 1e-3.
TOLERANCE = {"fp32": (1e-4, 1e-4), "bf16": (1e-2, 5e-2)}


@pytest.mark.distributed
def test_every_stage_and_precision_trains_as_plain_torch_does():
    done = train_factory.run("tests.ranks_engine", ranks=2)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("engine ")]
    assert len(lines) == 8
    for _, stage, precision, raw, ema, norm, blocks in lines:
        weights, gradient = TOLERANCE[precision]
        assert float(raw) <= weights, (stage, precision)
        assert float(ema) <= weights, (stage, precision)
        assert float(norm) <= gradient, (stage, precision)
        # Norms by block of gradient, update, weights and EMA distance.
        assert float(blocks) <= {"fp32": 1e-4, "bf16": 0.1}[precision], (stage, precision)
