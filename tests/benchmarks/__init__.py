"""Benchmarks: `python -m tests.benchmarks.NAME [--json FILE]`, never part of a test run."""
