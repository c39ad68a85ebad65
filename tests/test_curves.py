"""Curves of objectives over their margin: against closed forms, differences, and what has none."""

import math

import pytest

import fastpo
from fastpo import cli, curves, objectives

# Of logits, of rewards of some width or rank, of errors, of a critic: no margin moves them.
WITHOUT = {
    *objectives.available("transforms"),
    *("ppo_value", "oreo_value"),
    *("forward_kl", "reverse_kl", "jsd", "alpha_divergence", "tvd", "topk_kl", "adpa"),
    *("aligndistil", "gpm", "pal", "lore", "vpl", "maxmin_rm", "contextual_quality"),
    *("rm_listmle", "rm_regression", "restricted_ce", "diffusion_dpo"),
    *("reward_weighted_denoising", "distillation_dpo"),
}
DRAWN = [key for key in objectives.available() if key not in WITHOUT]


@pytest.mark.parametrize("key", DRAWN)
def test_every_objective_of_a_margin_has_a_curve(key):
    for good in (True, False) if curves.is_judged(key) else (True,):
        found = curves.curve(key, good=good)
        assert len({len(numbers) for numbers in found}) == 1
        assert all(map(math.isfinite, found.values + found.gradients))
        assert any(found.gradients)


@pytest.mark.parametrize("key", sorted(WITHOUT))
def test_what_has_no_margin_says_so(key):
    with pytest.raises(ValueError, match=f"^{key}: expected an objective of a margin or a log-ra"):
        curves.curve(key)


def test_it_needs_no_import_of_its_own():
    assert fastpo.__getattr__("curves") is curves


def test_dpo_is_the_logistic_loss():
    beta = 0.3
    for margin, value, gradient in zip(*curves.curve("dpo", beta=beta), strict=True):
        assert math.isclose(value, math.log1p(math.exp(-beta * margin)), rel_tol=1e-12)
        assert math.isclose(gradient, -beta / (1 + math.exp(beta * margin)), rel_tol=1e-12)


@pytest.mark.parametrize("key", ["simpo", "orpo", "mmpo", "tdpo", "infonca", "bt", "kto", "prdp"])
def test_the_gradient_is_that_of_the_value(key):
    margins, values, gradients = curves.curve(key)
    step = margins[1] - margins[0]
    for i in range(1, len(margins) - 1):
        slope = (values[i + 1] - values[i - 1]) / (2 * step)
        assert math.isclose(slope, gradients[i], rel_tol=5e-3, abs_tol=1e-3)


def test_a_clipped_ratio_stops_at_its_bound():
    good, bad = (curves.curve("grpo", good=good) for good in (True, False))
    clipped = [x for x, slope in zip(good.margins, good.gradients, strict=True) if slope == 0]
    assert min(clipped) > math.log(1.2) - 0.025 and max(clipped) == 2
    clipped = [x for x, slope in zip(bad.margins, bad.gradients, strict=True) if slope == 0]
    assert max(clipped) < math.log(0.8) + 0.025 and min(clipped) == -2


def test_kto_of_a_bad_answer_falls_with_it():
    assert curves.is_judged("kto") and not curves.is_judged("dpo")
    assert max(curves.curve("kto").gradients) < 0 < min(curves.curve("kto", good=False).gradients)


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "kto.png"
    assert cli.main(["objectives", "kto", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("kto (singles)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jsd", "--plot", "x.png"], "jsd: expected an objective of a margin or a log-ratio, got"),
        (["--plot", "x.png"], "--plot: expected the key of an objective beside it, got none"),
        (["dpo", "--plot", "x.word"], "plot: expected a picture's path, got x.word"),
        (["dpo", "--plot", "no/x.png"], "plot: expected a file in a folder to write to, got 'no/"),
        (["dpo", "--plot", "."], "plot: expected a file to write, got the folder '.'"),
        (["dpo", "--plot", ""], "plot: expected a file to write, got the folder '.'"),
        (["dpo", "--family", "tokens", "--plot", "x.png"], "family: expected none beside the key"),
    ],
)
def test_what_cannot_be_drawn_is_said(arguments, message, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["objectives", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
