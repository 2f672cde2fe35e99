"""Layouts are proven by running them, and one that is wrong is not."""

import json

import jax
import numpy as np
import pytest

from experiments import layouts
from transformer.layouts import Split
from transformer.sharding import Layout

SMALL = {"n_layers": "2", "d_model": "32", "d_head": "4", "d_ff": "32"}


def request(tmp_path, **changes):
    given = {"model": SMALL, "seq_len": 16, "global_batch_seqs": 16, "steps": 2, "json": True, "out": str(tmp_path)}
    return layouts.LayoutsRequest(**given | changes)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "changes",
    [
        {"layouts": 3},
        {"layouts": 2, "model": SMALL | {"n_experts": "4", "experts_per_token": "4"}, "precision": "bf16"},
        {"layouts": 1, "model": SMALL | {"family": "encoder_decoder"}, "seq_len": 64},
        {"layout": "pipeline=2,fsdp=2,expert=2,zero=1", "microbatches": 4, "model": SMALL | {"n_experts": "8"}},
    ],
    ids=lambda c: c.get("layout") or f"{c['layouts']} of {c.get('model', SMALL).get('family', 'decoder')}",
)
def test_layouts_are_proven(changes, tmp_path, capsys):
    asked = request(tmp_path, **changes)
    assert layouts.main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == asked.layouts or asked.layout
    for record in found:
        assert record["proven"]
        assert 0 <= record["loss_difference"] <= record["tolerance"]
        assert 0 < record["gradient_difference"] <= record["tolerance"]
        assert record["tolerance"] == (2e-2 if asked.precision == "bf16" else 1e-4)
        assert "/" in record["worst_gradient"]
        assert record["family"] == asked.resolved_model.family
    assert len((tmp_path / layouts.FILE).read_text().splitlines()) == len(found)


def test_what_is_proven_is_not_run_again(tmp_path, monkeypatch, capsys):
    asked = request(tmp_path, layout="fsdp=8")
    assert layouts.main(asked) == 0
    with (tmp_path / layouts.FILE).open("a") as file:
        file.write('{"cut off')
    monkeypatch.setattr(layouts, "_run", lambda *_: pytest.fail("it ran again"))
    assert layouts.main(asked) == 0
    assert "1 of 1 layouts of decoder are proven" in capsys.readouterr().err


def test_a_layout_that_is_wrong_is_not_proven(tmp_path, monkeypatch, capsys):
    """Tokens that are not where attention takes them to be: the batch in order, its places balanced."""
    monkeypatch.setattr("experiments.gradients.context_order", lambda length, _: np.arange(length))
    assert layouts.main(request(tmp_path, layout="fsdp=2,context=2,data=2")) == 1
    told = capsys.readouterr()
    assert "0 of 1" in told.err
    assert json.loads(told.out)[0]["gradient_difference"] > 0.01


def test_largest_difference_is_of_each_parameter_by_itself():
    want = {"a": {"w": np.asarray([100.0, 1.0])}, "b": np.asarray([0.5, 0.0]), "c": np.asarray([1e-9])}
    got = {"a": {"w": np.asarray([100.0, 2.0])}, "b": np.asarray([0.5, 0.1]), "c": np.asarray([2e-9])}
    assert layouts.largest_difference(got, want) == (pytest.approx(0.2), "b")  # 1 %, 20 %, and 1e-8 of 0.1
    got["b"][0] = np.nan
    assert layouts.largest_difference(got, want)[1] == "b"
    assert np.isnan(layouts.largest_difference(got, want)[0])


def test_the_same_parameters_whatever_the_layout(tmp_path, eight_devices):
    asked = request(tmp_path)
    one, many = (next(layouts._run(asked, Split(layout))) for layout in (Layout(), Layout(fsdp=8)))
    assert one[0] == pytest.approx(many[0], rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one[1], many[1])
