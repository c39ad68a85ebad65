"""Objectives by name on datasets that differ in columns, and options that would change nothing."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("trl", minversion="1.15")  # the first with a fused head
pytest.importorskip("datasets")

import _tiny as tiny
import _trainers
import torch
from _tiny import one_thread  # noqa: F401

import fastpo
from fastpo.integrations.trl.objectives.columns import _check_numbers, _placed, _stacked

CPU = torch.device("cpu")
WEIGHTS = {"pair_weights": [3.0, 0.1, 2.0, 0.5, 1.0, 4.0]}
SUMS = {"ref_chosen_logps": [-30.0] * 6, "ref_rejected_logps": [-20.0] * 6}
PLAIN = {"DPO": tiny.preferences, "KTO": tiny.unpaired}


def rows(prefix="DPO", columns=None):
    data = PLAIN[prefix]()
    for name, values in (columns or {}).items():
        data = data.add_column(name, values)
    return data


def trainer(folder, train=None, *, evaluated=None, prefix="DPO", given=None, **changes):
    data = rows(prefix, train)
    path = _trainers.saved(folder)
    return _trainers.build(
        prefix, folder, path, data, changes, eval_dataset=evaluated, **(given or {})
    )


def losses(built):
    built.train()
    return [log["loss"] for log in built.state.log_history if "loss" in log]


COLUMNS = {"plain": {}, "weights": WEIGHTS, "sums": SUMS}
# A training set with sums loads no reference, which sets without them are refused for.
BESIDE = {"plain": COLUMNS, "weights": COLUMNS, "sums": ["sums"]}


@pytest.mark.parametrize(("one", "another"), [(x, y) for x in BESIDE for y in BESIDE[x]])
def test_an_evaluation_set_changes_nothing_that_is_trained(one, another, tmp_path):
    train, other = COLUMNS[one], COLUMNS[another]
    with fastpo.patched(objective="dpo"):
        alone = losses(trainer(tmp_path, train))
        options = {"eval_strategy": "steps", "eval_steps": 1}
        built = trainer(tmp_path, train, evaluated=rows(columns=other), **options)
        assert (built.ref_model is None) == (train == SUMS)
        assert losses(built) == pytest.approx(alone)
        before = trainer(tmp_path, train)
        before.evaluate(rows(columns=other))
        assert losses(before) == pytest.approx(alone)


def test_each_set_is_scored_with_its_own_columns(tmp_path):
    """Losses of evaluation are those of a trainer of that set alone."""
    with fastpo.patched(objective="dpo"):
        sets = {name: rows(columns=columns) for name, columns in COLUMNS.items()}
        alone = [trainer(tmp_path, COLUMNS[name]).evaluate(sets[name]) for name in sets]
        metrics = trainer(tmp_path, evaluated=sets).evaluate()
    each = [metrics[f"eval_{name}_loss"] for name in sets]
    assert each == pytest.approx([one["eval_loss"] for one in alone])
    assert len({round(loss, 4) for loss in each}) == 3, "the columns must count"


LACKING = r"ref_chosen_logps: expected a column in dataset '{}', too, .*or a ref_model, got columns"


def test_a_set_without_the_training_set_s_reference(tmp_path):
    """None was loaded, and the policy is not its own."""
    with fastpo.patched(objective="dpo"):
        with pytest.raises(ValueError, match=LACKING.format("held")):
            trainer(tmp_path, SUMS, evaluated={"held": rows()})
        built = trainer(tmp_path, SUMS)
        batch = next(iter(trainer(tmp_path).get_train_dataloader()))
        with pytest.raises(ValueError, match=LACKING.format("eval")):
            built.evaluate(rows())
        with pytest.raises(ValueError, match="ref_model: expected a model, as these rows lack"):
            built.compute_loss(built.model, dict(batch))


@pytest.mark.parametrize("source", ["adapter", "ref_model"])
def test_a_reference_that_is_there_scores_a_set_without_columns(source, tmp_path):
    def given():
        if source == "adapter":
            return {"peft_config": _trainers.lora()}
        return {"ref_model": tiny.model("llama", seed=1)}

    with fastpo.patched(objective="dpo"):
        expected = trainer(tmp_path, given=given()).evaluate(rows())["eval_loss"]
        built = trainer(tmp_path, SUMS, given=given())
        assert built.evaluate(rows())["eval_loss"] == pytest.approx(expected)


def test_a_missing_column_is_one_of_that_dataset(tmp_path):
    scores = {"chosen_scores": [1.0] * 6, "rejected_scores": [0.0] * 6}
    message = r"chosen_scores: expected .*, got columns \[.*\] in dataset 'eval'"
    with fastpo.patched(objective="odpo"), pytest.raises(ValueError, match=message):
        trainer(tmp_path, scores, evaluated=rows())


def test_sums_that_a_set_has_are_not_computed_again(tmp_path):
    """A dataset cannot have a column twice."""
    options = {"precompute_ref_log_probs": True}
    with fastpo.patched(objective="dpo"):
        expected = trainer(tmp_path, SUMS).evaluate(rows(columns=SUMS))["eval_loss"]
        built = trainer(tmp_path, evaluated=rows(columns=SUMS), **options)
        assert built.evaluate()["eval_loss"] == pytest.approx(expected)


UNHEARD = {
    "dpo beta": ("DPO", "dpo", {"beta": 5.0}, r"beta: .* 0\.1 with dpo \(give beta= to .*got 5\.0"),
    "smoothing": ("DPO", "dpo", {"label_smoothing": 0.4}, r"label_smoothing: .*dpo.*got 0\.4"),
    "no beta": ("DPO", "sft", {"beta": 0.3}, r"beta: expected 0\.1 with sft, got 0\.3"),
    "kto beta": ("KTO", "kto", {"beta": 0.7}, r"beta: expected 0\.1 with kto .*got 0\.7"),
    "kto weight": ("KTO", "kto", {"desirable_weight": 5.0}, r"desirable_weight: .*got 5\.0"),
    "weights": ("DPO", "dpo", {"loss_weights": [2.0]}, r"loss_weights: expected None .*got \[2\.0"),
    "sync": ("DPO", "simpo", {"sync_ref_model": True}, r"sync_ref_model: .*simpo, which needs no"),
}


@pytest.mark.parametrize("case", UNHEARD)
def test_an_option_that_would_change_nothing(case, tmp_path):
    prefix, key, changes, message = UNHEARD[case]
    with fastpo.patched(objective=key), pytest.raises(ValueError, match=message):
        trainer(tmp_path, prefix=prefix, **changes)


def test_an_option_that_says_what_the_patch_says(tmp_path):
    with fastpo.patched(objective="cpo", beta=0.7, label_smoothing=0.2):
        expected = losses(trainer(tmp_path))
        assert losses(trainer(tmp_path, beta=0.7, label_smoothing=0.2)) == pytest.approx(expected)
    with fastpo.patched(objective="sft"):
        assert trainer(tmp_path, beta=1.0).args.beta == 1.0, "its rewards are logged with 1"


def third(data):
    texts = [[{"role": "assistant", "content": text}] for text in tiny.GOOD[::-1]]
    return data.add_column("third", texts)


BEYOND = {
    "ld_dpo": "ref_chosen_token_logps",
    "tdpo": "chosen_token_kl",
    "wpo": "ref_chosen_token_logps",
    "vpo": "ref_third_logps",
}


@pytest.mark.parametrize("key", BEYOND)
def test_sums_cannot_be_all_of_the_reference(key, tmp_path):
    data = third(rows()) if "third" in BEYOND[key] else rows()
    message = f"precompute_ref_log_probs: expected False with {key}, which needs {BEYOND[key]}"
    changes = {"precompute_ref_log_probs": True}
    with fastpo.patched(objective=key), pytest.raises(ValueError, match=message):
        _trainers.build("DPO", tmp_path, _trainers.saved(tmp_path), data, changes)


def test_terms_have_their_weights(tmp_path):
    def loss(names, weights):
        with fastpo.patched():
            built = trainer(tmp_path, loss_type=names, loss_weights=weights)
            torch.manual_seed(0)
            batch = next(iter(built.get_train_dataloader()))
            return built.compute_loss(built.model, dict(batch)).item()

    both = loss(["simpo", "cpo"], [1.0, 0.25])
    assert both == pytest.approx(loss(["simpo"], [1.0]) + 0.25 * loss(["cpo"], [1.0]), rel=1e-5)


def test_prompts_are_scored_where_asked(tmp_path):
    with fastpo.patched(objective="dpo", score_prompts=True):
        batch = next(iter(trainer(tmp_path).get_train_dataloader()))
    assert torch.equal(batch["completion_mask"], batch["attention_mask"])


def test_shapes_of_columns():
    """A row for each further model; -1 where no token stands."""
    history = _stacked("history_chosen_logps", [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], CPU)
    assert history.tolist() == [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]
    places = torch.tensor([[0, 0, 1, 2, 0]])  # of tokens, from 1
    assert _placed("chosen_segments", [[0, 1]], places).tolist() == [[-1, 0, 1, -1]]


def test_a_column_of_nan_is_named(tmp_path):
    """Its loss would be logged as 0. A sampler's NaN means that it is not known."""
    weights = {"pair_weights": [*WEIGHTS["pair_weights"][:5], float("nan")]}
    with fastpo.patched(objective="dpo"):
        built = trainer(tmp_path, weights)
    batches = built.get_eval_dataloader(built.train_dataset)  # in order
    with pytest.raises(ValueError, match=r"^pair_weights: expected numbers, got NaN at \(\d,\) of"):
        list(batches)
    _check_numbers("sampler_token_logps", torch.tensor([[float("nan")]]))


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize(("prefix", "key"), [("DPO", "dpo"), ("KTO", "kto")])
def test_sums_computed_before_train_as_those_of_each_step(prefix, key, prompts, tmp_path):
    with fastpo.patched(objective=key, score_prompts=prompts):
        expected = losses(trainer(tmp_path, prefix=prefix))
        found = losses(trainer(tmp_path, prefix=prefix, precompute_ref_log_probs=True))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["whole", "adapter"])
def test_the_policy_is_no_other_model(wrapped, tmp_path):
    model = tiny.model("llama")
    given = {"peft_config": _trainers.lora()} if wrapped else {"ref_model": tiny.model(seed=1)}
    message = r"references\['prev'\]: expected another model than the policy"
    with (
        fastpo.patched(objective="inpo", references={"prev": model}),
        pytest.raises(ValueError, match=message),
    ):
        _trainers.build("DPO", tmp_path, model, rows(), {}, **given)
    assert any(x.requires_grad for x in model.parameters()), "it has not been frozen"


def test_third_texts_in_the_chat_template_of_their_row(tmp_path):
    words = copy.deepcopy(tiny.tokenizer())
    words.chat_template = "{% if loud %}bird {% endif %}" + words.chat_template
    data = third(rows()).add_column("chat_template_kwargs", [{"loud": True}] * 6)
    with fastpo.patched(objective="tpo_triple"):
        path = _trainers.saved(tmp_path)
        built = _trainers.build("DPO", tmp_path, path, data, {}, processing_class=words)
    row = built.train_dataset[0]
    assert row["third_prompt_ids"] == row["prompt_ids"]
    assert words.decode(row["third_prompt_ids"]).startswith("bird <|user|>")


def test_third_texts_of_an_iterable_dataset(tmp_path):
    data, path = third(rows()).to_iterable_dataset(), _trainers.saved(tmp_path)
    with (
        fastpo.patched(objective="tpo_triple"),
        pytest.raises(ValueError, match="dataset: expected a map-style one beside 'third', got I"),
    ):
        _trainers.build("DPO", tmp_path, path, data, {})


def kto_batch_loss(folder, columns, **options):
    """Of the first batch, and the trainer."""
    reference = tiny.model("llama", seed=1)
    with fastpo.patched(objective="kto", **options):
        built = trainer(folder, columns, prefix="KTO", given={"ref_model": reference})
        batch = dict(next(iter(built.get_train_dataloader())))
        return built, batch, built.compute_loss(built.model, dict(batch))


def test_kto_with_a_column_of_reference_sums(tmp_path):
    """The mismatched rows of its KL estimate have none: the reference runs for them."""
    path = tmp_path / "sums"
    built, batch, plain = kto_batch_loss(path, None)
    with torch.no_grad():
        (sums, kl) = built.compute_ref_log_probs(built.ref_model, batch)
    batch["ref_logps"] = sums
    torch.testing.assert_close(built.compute_loss(built.model, dict(batch)), plain)
    batch["ref_logps"] = sums - 5
    moved = built.compute_loss(built.model, dict(batch))
    assert abs(moved - plain) > 1e-3, "the column counts"
    batch["ref_KL_logps"] = kl
    torch.testing.assert_close(built.compute_loss(built.model, dict(batch)), moved)


def test_kto_trains_on_its_columns(tmp_path):
    with fastpo.patched(objective="kto"):
        built = trainer(tmp_path, {"ref_logps": [-25.0] * 12}, prefix="KTO")
        assert built.ref_model is not None
        own = losses(built)
        both = {"ref_logps": [-25.0] * 12, "ref_KL_logps": [-20.0] * 12}
        whole = trainer(tmp_path, both, prefix="KTO")
        assert whole.ref_model is None
        assert losses(whole) != pytest.approx(own)


def test_kto_without_a_reference(tmp_path):
    """Log-ratios are log-probabilities, those of the KL estimate too: far below 0."""
    with fastpo.patched(objective="kto", reference_free=True):
        built = trainer(tmp_path, prefix="KTO")
        assert built.ref_model is None
        assert all(torch.isfinite(torch.tensor(losses(built))))


def test_an_option_that_the_named_objective_has_not(tmp_path):
    """Beside a loss of TRL's own, which may have it, TRL decides."""
    both = {"loss_type": ["orpo", "sigmoid"], "loss_weights": [1.0, 1.0], "label_smoothing": 0.1}
    unheard = {"label_smoothing": 0.1, "discopop_tau": 0.2}
    with fastpo.patched():
        for option, value in unheard.items():
            message = rf"{option}: expected 0\.0\d* with orpo, got {value}"
            with pytest.raises(ValueError, match=message):
                trainer(tmp_path, loss_type="orpo", **{option: value})
        built = trainer(tmp_path, loss_type="orpo", beta=0.3)
        assert "beta=0.3" in str(built._fastpo.terms[0])
        trainer(tmp_path, **both)


def test_an_objective_that_reads_the_head_again_outlives_no_patch(tmp_path):
    with fastpo.patched(objective="tdpo"):
        built = _trainers.build("DPO", tmp_path, _trainers.saved(tmp_path), tiny.preferences(), {})
    with pytest.raises(RuntimeError, match="expected in force while training in"):
        built.train()
