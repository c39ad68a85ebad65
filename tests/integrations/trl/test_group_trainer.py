"""`fastpo.GroupTrainer` against full logits, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import re

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
import transformers
from _tiny import one_thread  # noqa: F401
from datasets import Dataset

import fastpo
from fastpo import objectives
from fastpo.integrations.trl.objectives.groups import _ranking
from fastpo.objectives._quantities import SHAPES
from fastpo.objectives._registry import quantities_of
from fastpo.quantities import Quantities


def groups(**columns):
    """Three groups of 3, 1 and 2 completions."""
    texts = [["a warm colour", "no", "blue"], ["on the mat"], ["the bird", "cat cat cat"]]
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completions": [[{"role": "assistant", "content": text}] for text in each],
            "scores": [float(i * i) for i in range(len(each))],
        }
        for question, each in zip(tiny.QUESTIONS, texts, strict=False)
    ]
    return Dataset.from_list([{**row, **columns} for row in rows])


def trainer(
    folder, objective, *, data=None, ref_model=None, reference_free=False, words=None, **changes
):
    return fastpo.GroupTrainer(
        _trainers.saved(folder),
        ref_model,
        _trainers.config("DPO", folder, {"per_device_train_batch_size": 3, **changes}),
        objective=objective,
        reference_free=reference_free,
        train_dataset=groups() if data is None else data,
        processing_class=words or tiny.tokenizer(),
    )


def token_logps(model, batch):
    """[N, T], 0 where nothing is scored."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.where(mask, tokens, 0.0)


# What an objective may want beside scores: a number per completion, or one per token of it.
COLUMNS = {
    "labels": lambda score, n: score > 0,
    "sampler_logps": lambda score, n: -3.0 - score,
    "old_token_logps": lambda score, n: [-2.0] * n,
}


def wanted(key):
    return quantities_of(objectives.get(key))


def with_columns(key, data, folder):
    names = set(wanted(key)) & set(COLUMNS)
    if not names:
        return data
    tokens = trainer(folder, "infonca").train_dataset["completion_ids"]
    for name in names:
        values = [
            [COLUMNS[name](score, len(ids)) for score, ids in zip(scores, each, strict=True)]
            for scores, each in zip(data["scores"], tokens, strict=True)
        ]
        data = data.add_column(name, values)
    return data


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("key", objectives.available("groups"))
def test_the_loss_is_that_of_full_logits(key, patched, tmp_path):
    """One batch: the loss and its gradient, against log-softmax in float64."""
    reference = tiny.model("llama", seed=1)
    data = with_columns(key, groups(), tmp_path)
    with fastpo.patched() if patched else contextlib.nullcontext():
        built = trainer(tmp_path, key, data=data, ref_model=reference)
        batch = next(iter(built.get_train_dataloader()))
        loss = built.compute_loss(built.model, dict(batch))
    loss.backward()
    gradient = built.model.lm_head.weight.grad.clone()
    built.model.zero_grad()
    policy = built.model.double()
    given = {name: x for name, x in batch.items() if name in SHAPES}
    given |= by_the_book(policy, reference.double(), batch)
    expected = Quantities(given).rows(objectives.get(key)).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient.double(), policy.lm_head.weight.grad, rtol=1e-3, atol=1e-6)


def by_the_book(policy, reference, batch):
    mask = batch["completion_mask"][:, 1:].bool()
    with torch.no_grad():
        other = token_logps(reference, batch)
    return {"mask": mask, "token_logps": token_logps(policy, batch), "ref_token_logps": other}


def test_groups_train_and_log(tmp_path):
    built = trainer(tmp_path, objectives.get("infonca", beta=0.5), num_train_epochs=1)
    built.train()
    assert built.ref_model is not None
    log = built.state.log_history[0]
    names = {"rewards/accuracies", "rewards/margins", "rewards/mean", "logps/mean", "entropy"}
    assert names <= set(log)
    assert log["rewards/mean"] == 0.0, "the policy starts as its reference"
    assert log["rewards/accuracies"] == 0.0, "nothing is above what equals it"
    assert built.state.log_history[-2]["rewards/margins"] > 0


SCORES = [[0.0, 2.0, 2.0], [7.0], [1.0, 1.0]]  # one group of three has a best and a worse one


@pytest.mark.parametrize("ranked", [True, False])
def test_what_ranks_nothing_is_no_hit(ranked, tmp_path):
    """Nor do its rewards count as a margin."""
    scores = SCORES if ranked else [[1.0] * len(each) for each in SCORES]
    data = groups().remove_columns("scores").add_column("scores", scores)
    data = data.add_column("ref_logps", [[-30.0, -20.0, -25.0], [-28.0], [-22.0, -31.0]])
    built = trainer(tmp_path, "infonca", data=data, per_device_eval_batch_size=3)
    found = built.evaluate(data)
    assert ("eval_rewards/margins" in found) == ("eval_rewards/accuracies" in found) == ranked
    if ranked:
        batch = built.data_collator(list(built.train_dataset))
        with torch.no_grad():
            logps = token_logps(built.model.double().eval(), batch).sum(1)
        worse, one, other = 0.1 * (logps - batch["ref_logps"])[:3]
        margin = (one + other) / 2 - worse
        assert found["eval_rewards/margins"] == pytest.approx(margin.item(), rel=1e-4)
        assert found["eval_rewards/accuracies"] == float(max(one, other) > worse)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_is_logged_is_by_the_book(mode, tmp_path):
    reference = tiny.model("llama", seed=1)
    built = trainer(tmp_path, objectives.get("infonca", beta=0.5), ref_model=reference)
    batch = next(iter(built.get_train_dataloader()))
    built.model.train(mode == "train")
    loss = built.compute_loss(built.model, dict(batch))
    assert loss.requires_grad
    found = {name: value for name, (value,) in built._metrics[mode].items()}
    policy = built.model.double()
    given = by_the_book(policy, reference.double(), batch)
    ids, mask = batch["input_ids"], given["mask"]
    logits = policy(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    sums, others = given["token_logps"].sum(1), given["ref_token_logps"].sum(1)
    r = 0.5 * (sums - others)
    margins, hits = [], []
    for i in range(3):
        rewards, scores = (x[batch["groups"] == i] for x in (r, batch["scores"]))
        best, rest = scores.argmax(), rewards[scores < scores.max()]
        if len(rest):
            margins.append(rewards[best] - rest.mean())
            hits.append(rewards.argmax() == best)
    expected = {
        "entropy": entropy[mask].mean(),
        "logps/mean": sums.mean(),
        "rewards/mean": r.mean(),
        "rewards/margins": torch.stack(margins).mean(),
        "rewards/accuracies": torch.stack(hits).double().mean(),
    }
    assert found == pytest.approx({k: x.item() for k, x in expected.items()}, rel=1e-4)


def test_the_best_scored_may_be_several():
    """Of rewards 1, 3, 2 with scores 5, 5, 0, and of 4, 7 with scores 1, 0."""
    rewards, scores = torch.tensor([1.0, 3, 2, 4, 7]), torch.tensor([5.0, 5, 0, 1, 0])
    found = _ranking(rewards, scores, torch.tensor([0, 0, 0, 1, 1]), torch.tensor([3, 2]), 2)
    found = {name: total / number for name, (total, number) in found.items()}
    assert found["rewards/margins"] == ((1 + 3) / 2 - 2 + 4 - 7) / 2
    assert found["rewards/accuracies"] == 0.5


def test_the_loss_of_a_router_is_added(tmp_path):
    router = {"model_init_kwargs": {"output_router_logits": True}}
    tiny.model("qwen2_moe").save_pretrained(tmp_path / "model")
    losses = []
    for weight in (0.0, 1.0):
        built = trainer(tmp_path, "infonca", router_aux_loss_coef=weight, **router)
        batch = next(iter(built.get_train_dataloader()))
        losses.append(built.compute_loss(built.model.eval(), dict(batch)).item())
    assert losses[1] > losses[0] + 0.5


def test_no_reference_is_loaded_when_none_is_asked_for(tmp_path):
    built = trainer(tmp_path, "infonca", reference_free=True)
    assert built.ref_model is None
    batch = next(iter(built.get_train_dataloader()))
    loss = built.compute_loss(built.model, dict(batch))
    given = {name: x for name, x in batch.items() if name in SHAPES}
    given |= by_the_book(built.model, built.model, batch)
    given["ref_token_logps"] = torch.zeros_like(given["ref_token_logps"])
    expected = Quantities(given).rows(objectives.get("infonca")).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_long_groups_are_dropped_and_completions_truncated(tmp_path):
    whole = trainer(tmp_path, "infonca")
    longest = max(len(ids) for group in whole.train_dataset["prompt_ids"] for ids in group)
    built = trainer(tmp_path, "infonca", max_length=longest)
    kept = built.train_dataset["prompt_ids"]
    assert 0 < len(kept) < len(groups())
    assert next(iter(built.get_train_dataloader()))["input_ids"].shape[1] == longest
    ends = trainer(tmp_path, "infonca", max_length=longest, truncation_mode="keep_end")
    assert len(ends.train_dataset) == len(groups()), "of which something is left in any case"


def test_the_chat_template_is_given_its_columns(tmp_path):
    """As TRL's trainers give it."""
    words = copy.deepcopy(tiny.tokenizer())
    words.chat_template = "{% if tools %}cat {% endif %}{% if loud %}bird {% endif %}" + (
        words.chat_template
    )
    data = groups(tools="[{}]", chat_template_kwargs={"loud": True})
    built = trainer(tmp_path, "infonca", data=data, words=words)
    for prompt_ids in built.train_dataset["prompt_ids"]:
        for ids in prompt_ids:
            assert words.decode(ids).startswith("cat bird <|user|>")


ERRORS = {
    "dpo": r"dpo: expected an objective of groups, got pairs",
    "mdpo_multisample": r"column 'labels' \(one list per row, a number for every completion",
}


@pytest.mark.parametrize("key", ERRORS)
def test_what_cannot_be_is_named(key, tmp_path):
    with pytest.raises(ValueError, match=ERRORS[key]):
        trainer(tmp_path, key)


def test_groups_of_no_completions(tmp_path):
    for wrong in ([], None, "no"):
        data = Dataset.from_list([row | {"completions": wrong} for row in groups().to_list()])
        got = f"completions: expected a list of one or more texts in row 0, got {wrong!r}"
        with pytest.raises(ValueError, match=re.escape(got)):
            trainer(tmp_path, "infonca", data=data)


@pytest.mark.parametrize("name", ["prompt", "completions"])
def test_a_missing_text(name, tmp_path):
    message = "dataset 'train': expected columns prompt and completions, got "
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, "infonca", data=groups().remove_columns(name))


def test_a_column_called_groups(tmp_path):
    """Which completions are a group's is known without it."""
    losses = []
    for given in ({}, {"groups": "colours"}):
        built = trainer(tmp_path, "infonca", data=groups(**given))
        batch = next(iter(built.get_train_dataloader()))
        losses.append(built.compute_loss(built.model, dict(batch)).item())
    assert losses[0] == losses[1]


def test_lists_of_another_length(tmp_path):
    built = trainer(tmp_path, "infonca", data=groups(scores=[1.0]))
    with pytest.raises(ValueError, match="scores: expected 3 values, one per completion, got 1"):
        next(iter(built.get_train_dataloader()))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ld_alpha", 0.5),
        ("loss_type", ["ipo"]),
        ("loss_weights", [2.0]),
        ("f_divergence_type", "forward_kl"),
    ],
)
def test_options_of_pairs(option, value, tmp_path):
    got = re.escape(f"{option}: expected it unset for groups, got {value!r}")
    with pytest.raises(ValueError, match=got):
        trainer(tmp_path, "infonca", **{option: value})


REF_LOGPS = [[-30.0, -20.0, -25.0], [-28.0], [-22.0, -31.0]]


def test_reference_sums_of_a_column(tmp_path):
    """No reference is loaded, and the loss is of the column's log-ratios."""
    data = groups().add_column("ref_logps", REF_LOGPS)
    built = trainer(tmp_path, "infonca", data=data)
    assert built.ref_model is None
    batch = next(iter(built.get_train_dataloader()))
    assert sorted(batch["ref_logps"].tolist()) == sorted(x for each in REF_LOGPS for x in each)
    loss = built.compute_loss(built.model, dict(batch))
    mask, tokens = batch["completion_mask"][:, 1:].bool(), token_logps(built.model.double(), batch)
    given = {name: batch[name] for name in ("scores", "groups", "ref_logps")}
    given |= {"mask": mask, "token_logps": tokens}
    expected = Quantities(given).rows(objectives.get("infonca")).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="ref_logps: expected a column in dataset 'eval', too, as"):
        built.evaluate(groups())
    assert built.evaluate(data)["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_an_evaluation_set_has_columns_of_its_own(tmp_path):
    """With a reference loaded: the column where there is one, the model elsewhere."""
    data = groups().add_column("ref_logps", REF_LOGPS)
    expected = [trainer(tmp_path, "infonca", data=x).evaluate(x) for x in (groups(), data)]
    built = trainer(tmp_path, "infonca", per_device_eval_batch_size=3)
    found = [built.evaluate(x) for x in (groups(), data, groups())]
    losses = [one["eval_loss"] for one in found]
    assert losses == pytest.approx([expected[i]["eval_loss"] for i in (0, 1, 0)])
    assert losses[0] != pytest.approx(losses[1])


def test_an_iterable_dataset(tmp_path):
    message = "dataset 'train': expected a map-style datasets.Dataset, got IterableDataset"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, "infonca", data=groups().to_iterable_dataset())


def test_a_hyperparameter_in_the_config(tmp_path):
    message = (
        r"beta: expected 0\.1 with infonca \(give beta= to fastpo\.objectives\.get\), got 0\.7"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, "infonca", beta=0.7)
    same = objectives.get("infonca", beta=0.7)
    assert trainer(tmp_path, same, beta=0.7).args.beta == 0.7


@pytest.mark.parametrize("kind", [None, transformers.TrainingArguments])
def test_arguments_of_another_trainer(kind, tmp_path):
    args = None if kind is None else kind(output_dir=str(tmp_path))
    got = "None" if kind is None else kind.__name__
    with pytest.raises(ValueError, match=f"^args: expected a DPOConfig, got {got}$"):
        fastpo.GroupTrainer("unread", args=args, objective="infonca", train_dataset=groups())


def test_a_word_in_place_of_its_flag(tmp_path):
    with pytest.raises(ValueError, match="reference_free: expected True or False, got 'no'"):
        trainer(tmp_path, "infonca", reference_free="no")


def test_metrics_of_logits(tmp_path):
    """They were refused in the first evaluation only, after steps of training."""

    def build(**changes):
        return fastpo.GroupTrainer(
            _trainers.saved(tmp_path),
            args=_trainers.config("DPO", tmp_path, changes),
            objective="infonca",
            train_dataset=groups(),
            eval_dataset=groups(),
            processing_class=tiny.tokenizer(),
            compute_metrics=lambda predictions: {},
        )

    with pytest.raises(ValueError, match="compute_metrics: expected none, or prediction_loss_only"):
        build()
    trainer = build(prediction_loss_only=True)
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.args.prediction_loss_only = False
    found = trainer.predict(trainer.eval_dataset)
    assert found.metrics["test_loss"] > 0 and found.predictions is None
