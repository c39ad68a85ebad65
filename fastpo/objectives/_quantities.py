"""The names a quantity may have, its shape and whether the gradient reaches it.

`prepare` is the door of every objective: it checks shapes, computes half precision in float32,
cuts the gradient of constants and empties unscored positions, so that no entry has to.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ._math import promote

# Dimensions -> names; "*" marks a gradient, "|" separates the shapes one quantity may have.
_TABLE = {
    "B": """
        chosen_logps* rejected_logps* ref_chosen_logps ref_rejected_logps
        chosen_logratios* rejected_logratios* chosen_lengths rejected_lengths
        chosen_scores rejected_scores soft_labels margins pair_weights
        prev_chosen_logps prev_rejected_logps mixed_chosen_logps mixed_rejected_logps
        third_logps* ref_third_logps third_lengths ties timestep_weights
        chosen_errors* rejected_errors* ref_chosen_errors ref_rejected_errors""",
    "B|B D": "chosen_rewards* rejected_rewards*",
    "K B": "history_chosen_logps history_rejected_logps",
    "U": "unlabeled_logps* unlabeled_lengths",
    "B D": """
        prompt_embeddings anchors* user_weights* latent_mean* latent_logvar*
        chosen_score_gaps rejected_score_gaps chosen_displacements* rejected_displacements*""",
    "B E": "eigenvalues*",
    "B T": """
        chosen_mask rejected_mask chosen_token_logps* rejected_token_logps*
        ref_chosen_token_logps ref_rejected_token_logps
        old_chosen_token_logps old_rejected_token_logps
        chosen_token_weights rejected_token_weights chosen_kl_weights rejected_kl_weights
        chosen_segments rejected_segments chosen_token_kl* rejected_token_kl*
        chosen_entropy* rejected_entropy* chosen_log_sum_sq_probs rejected_log_sum_sq_probs
        rejected_alternative_token_logps*""",
    "N": """
        logps* ref_logps logratios* lengths scores sampler_logps groups labels forward_kl* steps
        sample_weights errors* label_ids""",
    "M": "kl_logratios",
    "N|N M": "rewards*",
    "N M": "objective_scores reference_scores",
    "N C": "label_logits*",
    "N|N T": "advantages values",
    "N T": """
        mask token_logps* old_token_logps ref_token_logps sampler_token_logps teacher_token_logps
        entropy* token_reverse_kl* token_weights old_values returns segments""",
    "N T|N 1": "is_weights",
    "P V": "student_logits* teacher_logits ref_teacher_logits reverse_teacher_logits",
    "P K": "student_topk_logps* teacher_topk_logps",
}

Shapes = tuple[tuple[str, ...], ...]  # the shapes one quantity may have


def parse_shapes(text: str) -> Shapes:
    """ "B|B D" -> (("B",), ("B", "D"))."""
    return tuple(tuple(shape.split()) for shape in text.split("|"))


SHAPES = {
    name.rstrip("*"): parse_shapes(shapes)
    for shapes, names in _TABLE.items()
    for name in names.split()
}
DIFFERENTIABLE = frozenset(
    name.rstrip("*") for names in _TABLE.values() for name in names.split() if name.endswith("*")
)
_KEEP_INTEGERS = ("lengths", "steps", "label_ids")  # by how they end


def is_mask(name: str) -> bool:
    return name == "mask" or name.endswith("_mask")


def mask_of(name: str) -> str:
    """The mask that says which positions of a token-level quantity are scored."""
    side = next((side for side in ("chosen_", "rejected_") if side in name), "")
    return side + "mask"


def _text(shape: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    dims = [str(sizes.get(dim, dim)) for dim in shape]
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


def _check_shape(name: str, value: Tensor, shapes: Shapes, sizes: dict[str, int]) -> None:
    """Match value against the shapes it may have; `sizes` remembers every dimension seen."""
    got = tuple(value.shape)
    for shape in shapes:
        known = {"1": 1, **sizes}
        if len(shape) == len(got) and all(
            known.setdefault(dim, size) == size for dim, size in zip(shape, got, strict=True)
        ):
            sizes.update(known)
            return
    expected = " or ".join(_text(shape, sizes) for shape in shapes)
    raise ValueError(f"{name}: expected shape {expected}, got {got}")


def check_like(name: str, value: Tensor, rows: Tensor) -> None:
    """`value` has the shape of `rows`; broadcast, it would make other rows of them."""
    if value.shape != rows.shape:
        raise ValueError(f"{name}: expected shape {tuple(rows.shape)}, got {tuple(value.shape)}")


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value


def _dtype(name: str, value: Tensor) -> Tensor:
    if is_mask(name) or name == "ties":
        return value.bool()
    if name.endswith("groups"):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{name}: expected dtype torch.int64, got {value.dtype}")
        return value.long()
    if name.endswith("segments"):
        return value.long()  # -1 is none, which an unsigned id cannot be
    if value.is_floating_point() or name == "labels" or name.endswith(_KEEP_INTEGERS):
        return promote(value)
    return value.float()  # scores and advantages that arrive as integers


def prepare(
    given: Mapping[str, Tensor | None],
    gradient_into: Iterable[str] = (),
    shapes: Mapping[str, Shapes] = SHAPES,
) -> dict[str, Tensor]:
    """Checked and safe quantities; absent (None) ones are left out."""
    sizes: dict[str, int] = {}
    ready: dict[str, Tensor] = {}
    for name, value in given.items():
        if value is None:
            continue
        check_tensor(name, value)
        _check_shape(name, value, shapes[name], sizes)
        place = next(iter(ready.values()), value).device
        if value.device != place:  # torch's own error names no quantity
            raise ValueError(f"{name}: expected device {place}, got {value.device}")
        constant = name not in DIFFERENTIABLE and name not in gradient_into
        ready[name] = _dtype(name, value.detach() if constant else value)
    for name, value in ready.items():
        mask = ready.get(mask_of(name))
        if mask is not None and not is_mask(name) and value.shape == mask.shape:
            # An unscored position may hold any number; a later exp of it must not overflow.
            ready[name] = torch.where(mask, value, -1 if name.endswith("segments") else 0)
    return ready
