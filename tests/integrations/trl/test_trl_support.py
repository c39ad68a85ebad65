"""GRPO and RLOO over their sampler's words, judged by full logits and transformers' own warpers."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from importlib import metadata
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import trl
from _tiny import one_thread  # noqa: F401
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fastpo
from fastpo.integrations.trl import sampled
from fastpo.ops.shards.gathered import HeadOptions

SAMPLED = {
    "num_generations": 2,
    "max_completion_length": 5,
    "temperature": 0.9,
    "beta": 0.1,
    "num_iterations": 2,
    "learning_rate": 0.5,
}
KEPT = {"top_k": 20, "top_p": 0.6, "min_p": 0.25}
WARPERS = LogitsProcessorList([TopKLogitsWarper(20), TopPLogitsWarper(0.6), MinPLogitsWarper(0.25)])


def completions(model, input_ids, attention_mask, keep):
    """z [B, keep, V] of full logits, and the completion's words [B, keep]."""
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return logits[:, -keep - 1 : -1] / SAMPLED["temperature"], input_ids[:, -keep:]


def restricted(z, words, kept):
    """log p and entropy of the words, over those that are kept."""
    log_p = z.masked_fill(~kept, -torch.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp_min(-1e30)).sum(-1)
    return log_p.gather(-1, words.unsqueeze(-1)).squeeze(-1), entropy


def rule(z, words):
    kept = WARPERS(None, z.flatten(0, 1)).view_as(z) > -torch.inf
    return kept.scatter(-1, words.unsqueeze(-1), True)


def spying(prefix, words_of=rule):
    """A trainer class that holds every pass to the words of its batch; `passes` counts them, and
    `masses` are what the words had of all in each batch."""

    class Spy(getattr(trl, f"{prefix}Trainer")):
        def _generate_and_score_completions(self, inputs):
            self.early, self.passes = [], getattr(self, "passes", [])
            self.masses = getattr(self, "masses", [])
            output = super()._generate_and_score_completions(inputs)
            ids = [
                torch.cat((output[f"prompt_{n}"], output[f"completion_{n}"]), 1)
                for n in ("ids", "mask")
            ]
            z, words = completions(self.model, *ids, output["completion_ids"].shape[1])
            kept = words_of(z, words)
            mass = (z.double().softmax(-1) * kept).sum(-1)
            self.masses.append(mass[output["completion_mask"].bool()].mean().item())
            found = zip(ids[0], kept, strict=True)
            self.kept = getattr(self, "kept", {}) | {tuple(r.tolist()): own for r, own in found}
            for call in self.early:
                self.judge(*call)
            self.early = None
            return output

        def _get_per_token_logps_and_entropies(self, model, ids, mask, keep, *args, **options):
            given = model, ids, mask, keep, *args
            found = super()._get_per_token_logps_and_entropies(*given, **options)
            with self.as_asked(model):  # now, because parameters will change
                full = completions(model, ids, mask, keep)
            call = full, ids, mask[:, -keep:].bool(), found[:2]
            self.passes.append(found[0].requires_grad)
            if self.early is None:
                self.judge(*call)
            else:
                self.early.append(call)
            return found

        def as_asked(self, model):
            """The last pass of a generation is the reference's, the policy without its adapter."""
            timely = self.num_iterations == 1
            reference = self.early is not None and (timely or len(self.early) == 1)
            adapted = hasattr(model, "disable_adapter")
            return model.disable_adapter() if reference and adapted else contextlib.nullcontext()

        def judge(self, full, ids, mask, found):
            kept = torch.stack([self.kept[tuple(row.tolist())] for row in ids])
            assert not kept[mask].all(-1).any()
            for ours, own in zip(found, restricted(*full, kept), strict=True):
                if ours is not None:
                    torch.testing.assert_close(ours.detach()[mask], own[mask], atol=1e-4, rtol=1e-4)

    return Spy


def logged_masses(trainer):
    name = "fastpo/sampler_kept_mass"
    return [log[name] for log in trainer.state.log_history if name in log]


def by_turns(completion_ids, **_):
    """Never the same for both completions of a prompt."""
    return [float(i % 2) for i in range(len(completion_ids))]


def trainer(kind, prefix, folder, changes, **arguments):
    settings = {**SAMPLED, **changes}
    config = _trainers.config(prefix, folder, settings)
    torch.manual_seed(0)
    return kind(
        model=_trainers.saved(folder),
        args=config,
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        reward_funcs=by_turns,
        **arguments,
    )


@pytest.mark.parametrize("prefix", ["GRPO", "RLOO"])
def test_generation_kwargs_override_the_config(prefix, tmp_path):
    """As they do for the sampler: `spying` judges by KEPT."""
    changes = {"top_k": 3, "top_p": 0.9, "generation_kwargs": KEPT}
    with fastpo.patched(support=True):
        built = trainer(spying(prefix), prefix, tmp_path, changes)
        built.train()
    assert logged_masses(built) == pytest.approx(built.masses, rel=1e-5)


ON_THE_HEAD = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}


@pytest.mark.parametrize("adapted", [None, {}, ON_THE_HEAD])
@pytest.mark.parametrize(("prefix", "iterations"), [("GRPO", 2), ("GRPO", 1), ("RLOO", 2)])
def test_every_pass_is_over_the_words_of_the_policy_that_sampled(
    prefix, iterations, adapted, tmp_path
):
    """In GRPO with one iteration the reference is asked before anybody has seen the policy."""
    arguments = {} if adapted is None else {"peft_config": _trainers.lora(**adapted)}
    rate = 20.0 if adapted == {} else 0.5
    changes = {**KEPT, "num_iterations": iterations, "learning_rate": rate}
    with fastpo.patched(support=True):
        built = trainer(spying(prefix), prefix, tmp_path, changes, **arguments)
        built.train()
    assert sum(built.passes) == 3 and len(built.passes) > 3
    assert any(log.get("kl", 0) > 1e-3 for log in built.state.log_history)
    assert max(built.masses) < 0.99
    assert logged_masses(built) == pytest.approx(built.masses, rel=1e-5)
    assert sampled._batch.get() is None


def test_a_subclass_with_a_loss_of_its_own(tmp_path):
    """As GMPOTrainer is one: its policy's pass is over these words, too."""
    whole = vars(trl.GRPOTrainer)["_compute_loss"]

    class Own(spying("GRPO")):
        def _compute_loss(self, model, inputs):
            return whole(self, model, inputs)

    with fastpo.patched(support=True):
        built = trainer(Own, "GRPO", tmp_path, {**KEPT, "num_iterations": 2, "learning_rate": 0.5})
        built.train()
    assert sum(built.passes) == 3 and len(built.passes) > 3


def test_without_a_reference_the_policy_finds_them_itself(tmp_path):
    """Batches whose steps are in time with their generation are scored once, while they train."""
    with fastpo.patched(support=True):
        built = trainer(
            spying("GRPO"), "GRPO", tmp_path, {**KEPT, "beta": 0.0, "num_iterations": 1}
        )
        built.train()
    assert built.passes == [True] * 3
    assert logged_masses(built) == pytest.approx(built.masses, rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("prefix", ["GRPO", "RLOO"])
def test_a_sampler_that_keeps_all_words_changes_nothing(prefix, lora, tmp_path):
    """Nor does the reference of LoRA, whose adapter is off, once it has been trained."""
    runs, kind, changes = [], getattr(trl, f"{prefix}Trainer"), {"top_k": 0, "max_steps": 3}
    given = {"peft_config": _trainers.lora()} if lora else {}
    for options in ({}, {"support": True}):
        with fastpo.patched(**options):
            runs.append(_trainers.train(trainer(kind, prefix, tmp_path, changes, **given)))
    assert runs[0][0] == runs[1][0] and runs[0][0][2]["kl"] != 0


def every_third(z, words):
    kept = torch.arange(z.shape[-1]).expand(z.shape) % 3 == 0
    return kept.scatter(-1, words.unsqueeze(-1), True)


def rollouts(lengths, mask):
    """A rollout function that reports every third word and the one that it drew."""

    def rollout(prompts, trainer):
        vocab = trainer.model.config.vocab_size
        template = trainer.processing_class.apply_chat_template
        made = (template(p, add_generation_prompt=True, return_dict=True) for p in prompts)
        ids = [one["input_ids"] for one in made]
        drawn = [
            [(7 * i + j) % 40 + 3 for j in range(n)] for i, n in enumerate(lengths[: len(ids)])
        ]
        return {
            "prompt_ids": ids,
            "completion_ids": drawn,
            "logprobs": [[-1.0] * len(row) for row in drawn],
            "sampling_mask": [mask(row, vocab) for row in drawn],
        }

    return rollout


def test_what_the_sampler_reports_is_replayed(tmp_path):
    def mask(row, vocab):
        return [sorted({*range(0, vocab, 3), word}) for word in row]

    with fastpo.patched(support=True):
        built = trainer(
            spying("GRPO", every_third),
            "GRPO",
            tmp_path,
            {},
            rollout_func=rollouts([3, 5] * 8, mask),
        )
        built.train()
    assert len(built.passes) > 3
    first = built.state.log_history[0]
    # A sampler that says -1 of every word.
    assert first["fastpo/sampler_mean"] > 0 and first["fastpo/sampler_outside"] == 1
    assert first["fastpo/sampler_q01"] <= first["fastpo/sampler_q99"] < 1
    assert not logged_masses(built), "a product with all words"


def test_a_sampler_that_knows_no_log_probabilities(tmp_path):
    """None is an engine's NaN: TRL trains on, and there is nothing to compare."""

    def silent(prompts, trainer):
        made = rollouts([3, 5] * 8, lambda row, vocab: [[word] for word in row])(prompts, trainer)
        return made | {"logprobs": [[None] * len(row) for row in made["completion_ids"]]}

    with fastpo.patched(support=True):
        built = trainer(trl.GRPOTrainer, "GRPO", tmp_path, {}, rollout_func=silent)
        built.train()
    assert not any(k.startswith("fastpo/sampler") for x in built.state.log_history for k in x)


def test_a_truncated_completion_is_not_scored(tmp_path):
    """Its words were reported, too: the one that ends is scored over its own all the same."""

    def mask(row, vocab):
        return [sorted({*range(0, vocab, 3), word}) for word in row]

    def ending(prompts, trainer):
        made = rollouts([3, 5] * 8, mask)(prompts, trainer)
        for row, words in zip(
            made["completion_ids"][1::2], made["sampling_mask"][1::2], strict=True
        ):
            row[-1] = tiny.tokenizer().eos_token_id
            words[-1] = [row[-1]]
        return made

    def words_of(z, words):
        ended = words == tiny.tokenizer().eos_token_id
        kept = every_third(z, words).masked_fill(ended.unsqueeze(-1), False)
        return kept.scatter(-1, words.unsqueeze(-1), True)

    with fastpo.patched(support=True):
        built = trainer(
            spying("GRPO", words_of),
            "GRPO",
            tmp_path,
            {"mask_truncated_completions": True},
            rollout_func=ending,
        )
        built.train()
    assert len(built.passes) > 3
    assert any(log.get("grad_norm", 0) > 0 for log in built.state.log_history)


def test_a_report_of_another_length_is_refused(tmp_path):
    report = rollouts([3, 5] * 8, lambda row, vocab: [[word] for word in row[1:]])
    message = "sampling_mask: expected a list of word ids for each"
    with fastpo.patched(support=True):
        built = trainer(trl.GRPOTrainer, "GRPO", tmp_path, {}, rollout_func=report)
        with pytest.raises(ValueError, match=message):
            built.train()
    for sizes in ([1], [2, 2]):
        with pytest.raises(ValueError, match=message):
            sampled._words([fastpo.Support.of([[1], [2]])], sizes)


def test_outside_of_a_step_all_words_count(tmp_path):
    """Of what a script asks itself: scores, completions, the reference's adapter."""

    def rollout(prompts, trainer):
        return rollouts([3, 5] * 8, lambda row, vocab: [[word] for word in row])(prompts, trainer)

    with fastpo.patched(support=True):
        arguments = {"peft_config": _trainers.lora(), "rollout_func": rollout}
        built = trainer(trl.GRPOTrainer, "GRPO", tmp_path, KEPT, **arguments)
        ids = torch.arange(3, 11).view(1, 8)
        given = built.model, ids, torch.ones_like(ids), 4
        with sys.modules[trl.GRPOTrainer.__module__].use_adapter(built.model, None):
            found = built._get_per_token_logps_and_entropies(*given, compute_entropy=True)
            z, words = completions(*given)
        made = built._generate([row["prompt"] for row in tiny.prompts()])
    expected = restricted(z, words, torch.ones_like(z, dtype=torch.bool))
    torch.testing.assert_close(found[:2], expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(part, dict) and "sampling_mask" in part for part in made)


def test_a_head_for_fewer_tokens_than_were_sampled_is_refused():
    with (
        pytest.raises(RuntimeError, match="a head for each of 2 sampled tokens, got 0 tokens"),
        sampled._scoring(sampled.Replay(fastpo.Support.of([[1], [2]]))),
    ):
        pass
    assert sampled._over.get() is None


def test_heads_of_a_batch_in_parts_are_over_its_words_in_order():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 8, generator=g), torch.randn(6, 8, generator=g)
    targets, kept = torch.tensor([0, 2, 4]), torch.eye(3).repeat_interleave(2, 1).bool()
    replay, found = sampled.Replay(fastpo.Support.of([[0, 1], [2, 3], [4, 5]])), []
    for part in (slice(0, 1), slice(1, 3)):
        operands = hidden[part], weight, None, targets[part], HeadOptions()
        found.append(replay.score(operands, lambda *_: contextlib.nullcontext(), None).logps)
    torch.testing.assert_close(torch.cat(found), restricted(hidden @ weight.T, targets, kept)[0])
    replay.finish()
    other = sampled.Replay(fastpo.Support.of([[2, 3], [5]]))
    with pytest.raises(ValueError, match="got label 4 at token 1"):
        other.score(operands, lambda *_: contextlib.nullcontext(), None)


def test_tokens_that_a_tool_has_written_are_not_the_samplers():
    output = {"completion_mask": torch.tensor([[1, 1, 0]])}
    assert sampled._sampled(output).tolist() == [[True, True, False]]
    output["tool_mask"] = torch.tensor([[1, 0, 1]])
    assert sampled._sampled(output).tolist() == [[True, False, False]]
    model, metrics = torch.nn.Identity(), {"train": defaultdict(list), "eval": defaultdict(list)}
    logged = SimpleNamespace(model=model, _metrics=metrics)
    batch = sampled._Batch(mass=torch.tensor([0.5, 0.9]))
    sampled._log_mass(logged, batch, output)
    assert metrics["train"] == {"fastpo/sampler_kept_mass": [0.5]}
    model.eval()
    own = {"old_per_token_logps": torch.tensor([[-1.0, -9.0, -9.0]])}
    sampled._log(logged, output | own | {"sampling_per_token_logps": -torch.ones(1, 3)})
    assert metrics["eval"]["fastpo/sampler_mean"] == [1.0] and len(metrics["train"]) == 1
    count = len(metrics["eval"])
    sampled._log(logged, output | {"sampling_per_token_logps": -torch.ones(1, 3)})
    sampled._log_mass(logged, batch, output | {"tool_mask": torch.zeros(1, 3)})
    assert {len(x) for x in metrics["eval"].values()} == {1} and len(metrics["eval"]) == count


def test_the_policy_is_no_reference_after_it():
    """Where a trainer asks it once more in the same batch."""
    adapter = sampled._Adapter(lambda *_: contextlib.nullcontext())
    with sampled._of(sampled._Batch()) as batch:
        with adapter(None, None):
            assert batch.reference is not None
        assert batch.reference is None


def test_a_trl_without_its_seams_is_refused(monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda x: "1.14.0" if x == "trl" else version(x))
    with pytest.raises(RuntimeError, match=r"trl: expected version 1.15 or 1.16, got 1.14.0"):
        fastpo.patch(support=True)


def test_support_is_true_or_false():
    with pytest.raises(ValueError, match="support: expected True or False, got 'yes'"):
        fastpo.patch(support="yes")
    with contextlib.suppress(RuntimeError):
        fastpo.unpatch()
