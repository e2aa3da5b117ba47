"""How exactly torch computes on a GPU: TF32, and kernels that give the same bits again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether products and convolutions in fp32 may round their inputs to 10 bits; torch's default is
    yes for convolutions alone, which is neither."""
    backends: Any = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.allow_tf32 = was


def be_deterministic() -> None:
    """The same bits from the same inputs, for this whole process; an operation that cannot raises RuntimeError."""
    # cuBLAS reads it when it begins: it needs a workspace of its own.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Torch would fill all fresh memory too, which only helps to find reads of it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
