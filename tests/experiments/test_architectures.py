"""The table of architectures: what stands for them is small and whole, and the file around the table stays."""

import pytest

from experiments import architectures, entry
from experiments.architectures import ARCHITECTURES, BEGIN, END, shrunk
from transformer.accounting import n_params
from transformer.presets import preset


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shrunk_one_has_every_kind_of_layer_and_few_parameters(name):
    whole, small = preset(name), preset(name, shrunk(preset(name)))
    assert n_params(small) < 600_000
    assert {small.kind(i) for i in range(small.n_layers)} == {whole.kind(i) for i in range(whole.n_layers)}
    for key in ("family", "position", "norm", "norm_placement", "ffn", "parallel", "score", "router", "tied"):
        assert getattr(small, key) == getattr(whole, key)
    assert (small.kv_rank is None, small.n_experts is None) == (whole.kv_rank is None, whole.n_experts is None)


def test_only_the_table_is_replaced(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    ran = []
    monkeypatch.setattr(architectures, "_run", lambda command: ran.append(command[0]) or "failed: no device")
    argv = ["--presets=llama3-8b", f"--out={tmp_path / 'out'}", f"--readme={readme}"]
    assert architectures.main(entry.parse(architectures.Request, argv)) == 1
    assert ran == ["experiments.train", "experiments.ladder", "experiments.forecast", "experiments.forecast"]
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"# before\n\n{BEGIN}\n| architecture |")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "| `llama3-8b` | 8.03 B | failed: no device |" in text
    assert text.count("| --- |") == 1 or "---" in text
    assert "old" not in text
    assert capsys.readouterr().out.strip() in text
