"""Shards to a trained model, and what people need before and after."""

import os

# Read when torch's OpenMP loads. Threads that spin while they wait make a step ten times as long as
# soon as anything else runs on their cores, and gain nothing measurable when nothing does.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
