"""Muon with the averages of the weights."""

from typing import Any

import torch

from pipeline.training.ema import WithEMA

# torch's defaults, with the scale at which AdamW's LR and decay fit (2502.16982, 2.2).
MUON = {
    "momentum": 0.95,
    "nesterov": True,
    "ns_coefficients": (3.4445, -4.7750, 2.0315),
    "ns_steps": 5,
    "adjust_lr_fn": "match_rms_adamw",
    "eps": 1e-7,
}


class MuonAdamW(torch.optim.AdamW):
    """Muon (Jordan 2024) on groups marked `muon`, AdamW on the others, with one state."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any):
        groups = [group | MUON if group["muon"] else group for group in groups]
        super().__init__(groups, **options)
        matrices = [g for g in self.param_groups if g["muon"]]
        self._muon = torch.optim.Muon([p for g in matrices for p in g["params"]])

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        try:
            self.param_groups = [g for g in groups if not g["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        self._muon.param_groups = [g for g in groups if g["muon"]]
        self._muon.state = self.state
        self._muon.step()
        return loss


class MuonWithEMA(WithEMA, MuonAdamW):
    """Muon, AdamW and averages of the weights."""
