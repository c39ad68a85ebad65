"""The ratio between a trainer and its sampler, scored over all words and over those that were kept.

SmolLM2-135M-Instruct of `make demo-real` answers the embedded prompts through transformers'
`generate`; what it says of its own words, after its warpers, is the sampler's log-probability.

    python benchmarks/sampler.py --out benchmarks/results/cpu_epyc_sampler.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpo
from fastpo.bench import machine
from fastpo.bench.report import write
from fastpo.demo import smollm2
from fastpo.demo.data import embedded_pairs

TOP_P = 0.8


class Drawn(NamedTuple):
    """One answer: [T] words that were drawn, and [T, V] z after the warpers, -inf if left out."""

    words: Tensor
    z: Tensor
    hidden: Tensor  # [T, H], of a forward over the whole text, as a trainer has it

    @property
    def logps(self) -> Tensor:
        return self.z.log_softmax(-1).gather(1, self.words.unsqueeze(1)).squeeze(1)

    @property
    def support(self) -> fastpo.Support:
        return fastpo.Support.of([row.nonzero().squeeze(1).tolist() for row in self.z > -torch.inf])


@torch.no_grad()
def draw(model: Any, tokenizer: Any, prompt: Any, length: int) -> Drawn:
    asked = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(
        **asked,
        do_sample=True,
        top_p=TOP_P,
        top_k=0,
        temperature=1.0,
        max_new_tokens=length,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    first = asked["input_ids"].shape[1]
    hidden = model.model(input_ids=made.sequences).last_hidden_state[0, first - 1 : -1]
    return Drawn(made.sequences[0, first:], torch.cat(made.scores), hidden)


def rows(drawn: list[Drawn], weight: Tensor) -> list[dict[str, Any]]:
    sampler = torch.cat([one.logps for one in drawn])
    ways: dict[str, list[Tensor]] = {"all words": [], "the rule again": [], "what was kept": []}
    rule = fastpo.Support.rule(top_p=TOP_P)
    for one in drawn:
        supports = (None, rule, one.support)
        for found, support in zip(ways.values(), supports, strict=True):
            stats = fastpo.linear_logps(
                one.hidden, weight, one.words, support=support, outside="raw"
            )
            assert stats.logps is not None
            found.append(stats.logps)
    compared = {over: fastpo.diagnose(sampler, torch.cat(parts)) for over, parts in ways.items()}
    return [{"over": over, **found._asdict()} for over, found in compared.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=64, metavar="N", help="to sample (64)")
    parser.add_argument("--length", type=int, default=64, metavar="T", help="at most (64)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(smollm2.converted(print))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    prompts = [row["prompt"] for row in embedded_pairs().train[: options.answers]]
    drawn = [draw(model, tokenizer, prompt, options.length) for prompt in prompts]
    made = {
        "what": "sampler",
        "command": f"python benchmarks/sampler.py --answers {options.answers}",
        **machine.facts("cpu"),
        "model": smollm2.PACKAGE,
        "sampling": f"top_p = {TOP_P}",
        "threads": torch.get_num_threads(),
        "rows": rows(drawn, model.lm_head.weight.detach()),
    }
    for row in made["rows"]:
        print(row)
    write(made, options.out)


if __name__ == "__main__":
    main()
