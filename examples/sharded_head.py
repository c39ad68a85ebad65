"""SimPO in several processes, none of which holds the whole model or the whole head in training.

    torchrun --nproc_per_node 2 examples/sharded_head.py --steps 20
    torchrun --nproc_per_node 2 examples/sharded_head.py --data pairs.jsonl

FSDP2 gathers one layer at a time. The head stays sharded: the few hidden states are sent instead.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from by_hand import batches
from by_name import small_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import fastpo
from fastpo.demo.data import embedded_pairs
from fastpo.demo.tokenizer import texts_of, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="JSONL of prompt, chosen, rejected (messages)")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    lines = args.data.open(encoding="utf-8") if args.data else ()
    train([json.loads(line) for line in lines] or embedded_pairs().train, args.steps)
    dist.destroy_process_group()


def train(rows: list, steps: int) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (processes,))
    tokenizer = train_tokenizer(texts_of(rows), 4096)
    torch.manual_seed(0)  # the same model everywhere, before it is cut
    model = small_model(tokenizer)
    for part in (*model.model.layers, model.model):
        fully_shard(part, mesh=mesh)
    whole = model.lm_head.weight.detach()
    model.lm_head.weight = head = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    del whole
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    objective = fastpo.objectives.get("simpo")
    for step, batch in zip(
        range(1, steps + 1), batches(rows[rank::processes], tokenizer), strict=False
    ):
        mask = batch["mask"][:, 1:]  # [2B, T - 1], the chosen rows first
        labels = batch["ids"][:, 1:].masked_fill(~mask, -100)
        hidden = model.model(batch["ids"], attention_mask=batch["attended"]).last_hidden_state
        stats = fastpo.vocab_parallel_logps(hidden[:, :-1], head, labels, own_tokens=True)
        loss = fastpo.quantities.padded(stats, mask).rows(objective).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / processes
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step:>3}  loss {mean.item():.4f}")


if __name__ == "__main__":
    main()
