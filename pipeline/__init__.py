"""Shards to a trained model, and what people need before and after."""

import os

# Read when torch's OpenMP loads. By default a waiting thread spins for milliseconds: a step on two busy
# cores took 4 times as long as with this, while on two idle ones it costs a tenth.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
