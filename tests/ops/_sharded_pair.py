"""A student and a teacher for tests of heads in the shards of two processes."""

import torch

from fastpo.testing import make_head

TOKENS, VOCAB, CUT = 13, 211, 150  # the second process has the words from CUT on
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}, "alpha": {"alpha": 1.3}}
KINDS["tvd"] = {}
MAPS = {
    "plain": {},
    "mapped": {
        "temperature": torch.linspace(0.7, 1.6, TOKENS),
        "teacher_temperature": 1.3,
        "softcap": 6.0,
        "logit_scale": 1.4,
        "teacher_softcap": 9.0,
        "teacher_logit_scale": 0.7,
    },
}
LEAVES = ("dhidden", "dweight", "dbias")
LEAVES += tuple(f"dteacher_{name}" for name in ("hidden", "weight", "bias"))
MASK = torch.arange(TOKENS) % 5 > 0


def sides(dtype: torch.dtype) -> list[torch.Tensor]:
    """Hidden states, weight and bias of a student, and of a teacher that is no other model."""
    found = []
    for seed, width in enumerate((24, 40)):
        head = make_head(TOKENS, VOCAB, width, bias=True, seed=seed)
        found += [head.hidden * (1 - 0.3 * seed), head.weight, head.bias]
    return [x.detach().to(dtype).requires_grad_() for x in found]
