"""TRL's DPOTrainer with the loss taken from fastpo's table: data, head and reference stay TRL's."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from fastpo import TokenStats, quantities

from .objective import Objective, bind


class ObjectiveTrainer(DPOTrainer):
    """Set `objective` before `train`. The reference runs only when something asks for it."""

    objective: Objective

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Tensor:
        if return_outputs:
            raise ValueError("return_outputs: expected False, there are no logits to return")
        mask = inputs["completion_mask"]  # [2B, T + 1], chosen rows first
        arguments: dict[str, Any] = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        arguments["labels"] = inputs["input_ids"].masked_fill(mask == 0, -100)
        arguments |= {"use_cache": False, "fused_lm_head": True}

        frozen: Any = self.ref_model

        @cache
        def reference() -> Tensor:  # [2B, T]
            with torch.no_grad():
                return frozen(**arguments).log_probs

        head = model(**arguments)
        stats = TokenStats(head.log_probs, head.entropy, head.log_sum_sq_probs)
        pairs = len(mask) // 2
        q = quantities.padded(stats, mask[:, 1:].bool()) | {
            "ref_chosen_token_logps": lambda: reference()[:pairs],
            "ref_rejected_token_logps": lambda: reference()[pairs:],
        }
        loss = q.rows(bind(self.objective)).mean()
        if reference.cache_info().currsize or not model.training:
            self._log_rewards(q, "train" if model.training else "eval")
        return loss

    @torch.no_grad()
    def _log_rewards(self, q: quantities.Quantities, mode: str) -> None:
        """The rewards of DPO, whatever the objective is: how far each answer has moved."""
        beta: float = self.args.beta  # type: ignore[attr-defined]
        chosen, rejected = beta * q["chosen_logratios"], beta * q["rejected_logratios"]
        metrics = self._metrics[mode]
        for name, values in {
            "accuracies": (chosen > rejected).float(),
            "margins": chosen - rejected,
            "chosen": chosen,
            "rejected": rejected,
        }.items():
            metrics[f"rewards/{name}"].append(self.accelerator.gather(values).mean().item())
