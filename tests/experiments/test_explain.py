"""What is explained is what runs: bytes by hand and by the compiler, lines of this very file, XLA's own warnings."""

import json
import os
from pathlib import Path

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import layouts
from experiments.config import RunConfig, train_step
from experiments.diagnosis import collectives, compiler, placed
from experiments.diagnosis.source import Sources
from experiments.forecast import hlo
from experiments.forecast.__main__ import ForecastRequest
from experiments.forecast.__main__ import main as forecast_main
from experiments.forecast.groups import axis_of_collective
from transformer.errors import RequestError
from transformer.layers import Layer
from transformer.placement import OnMesh
from transformer.sharding import Layout

SMALL = {"n_layers": "2", "d_model": "32", "d_head": "4", "d_ff": "32"}


def lowered(layout: str, **changes):
    run = RunConfig(**{"model": SMALL, "seq_len": 16, "layout": layout, "micro_batch_seqs": 4} | changes)
    rung = run.rung(8)
    step = train_step(run, rung, jax.devices())
    program = step.step.lower(step.abstract_state, step.abstract_batch(rung.global_batch_seqs, run.length))
    return step, rung.layout, program


def explained(tmp_path, capsys, **changes):
    given = {"model": SMALL, "seq_len": 16, "explain": True, "json": True, "out": str(tmp_path / "none")}
    assert layouts.main(layouts.LayoutsRequest(**given | changes)) == 0
    assert not (tmp_path / "none").exists()
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def clumsy(monkeypatch):
    """What a layer adds is placed for the stream alone: nothing says where its gradient comes together."""

    def between(x, shard):
        return shard.activation(x, "batch", "sequence", "embed")

    monkeypatch.setattr("transformer.layers.between", between)


def test_bytes_of_parameters_by_hand_and_by_the_compiler(eight_devices, clumsy):
    step, layout, program = lowered("fsdp=4,tensor=2", seq_len=64)
    params = {p.name: p for p in placed.parameters(step, layout)}
    up = params["decoder/block_0/layer_0/ffn/w_up"]
    assert (up.dims, up.shape, up.used, up.replicated) == (
        ("layers", "embed", "ffn"),
        (2, 32, 32),
        ("fsdp", "tensor"),
        (),
    )
    assert up.n_bytes == 4 * 2 * (32 // 4) * (32 // 2)
    assert up.state_bytes == 3 * up.n_bytes  # and two moments
    norm = params["decoder/final_norm/scale"]
    assert (norm.n_bytes, norm.replicated) == (4 * 32, ("fsdp", "tensor"))
    state = sum(p.state_bytes for p in params.values())
    tokens = 3 * 4 * (16 // 4) * 64  # inputs, targets and weights of 16 sequences, over fsdp
    compiled = program.compile()
    assert compiled.memory_analysis().argument_size_in_bytes == state + tokens + 3 * 4  # and three counters

    # Tensor parallel attention's gradient changes sides by an all-to-all, for which the layout has no rule.
    sent = collectives.collectives(compiled.as_text(), hlo.parse(compiled.as_text()), layout, [])
    odd = [c for c in sent if c.kind == "all-to-all" and c.surprise]
    assert odd
    assert {c.surprise for c in odd} == {"no rule sends all-to-alls along tensor"}
    assert {c.origin.where.partition(":")[0] for c in odd} == {"transformer/attention.py"}


def test_activations_have_the_dims_and_the_line_of_the_rule_that_places_them(eight_devices):
    _, layout, program = lowered("fsdp=4,tensor=2")
    found = placed.constraints(program.as_text(dialect="hlo", debug_info=True), layout)
    hidden = next(p for p in found if p.dims == ("batch", "length", "ffn"))
    assert (hidden.shape, hidden.local_shape, hidden.n_bytes) == ((16, 16, 32), (4, 16, 16), 4 * 4 * 16 * 16)
    assert hidden.axes == (("slice", "data", "fsdp", "expert"), ("context",), ("tensor",))
    assert hidden.origin.where.startswith("transformer/feed_forward.py:")
    assert hidden.name.endswith("layer_0/ffn")
    stream = next(p for p in found if p.dims == ("batch", "sequence", "embed"))
    assert stream.local_shape == (4, 8, 32)
    read = next(p for p in found if p.dims == ("batch", "length", "embed"))
    assert (read.local_shape, read.replicated) == ((4, 16, 32), ("tensor",))
    assert all(p.dims for p in found)  # nothing is placed but by a rule


@pytest.mark.parametrize("layout", ["fsdp=2,pipeline=2,tensor=2", "fsdp=8,zero=1"])
def test_every_constraint_of_every_layout_is_a_rules(layout, eight_devices):
    _, of, program = lowered(layout)
    found = placed.constraints(program.as_text(dialect="hlo", debug_info=True), of)
    assert len(found) > 10
    assert all(p.dims for p in found)
    mapped = [p for p in found if "mapped" in p.named_dims]
    assert bool(mapped) == (of.pipeline > 1 or of.zero < 2)


def test_rules_that_do_nothing_and_what_copies_cost(eight_devices):
    step, layout, _ = lowered("data=2,fsdp=4")
    params = placed.parameters(step, layout)
    outcomes = {(r.table, r.dim): r.outcome for r in placed.rules(params, [], layout)}
    assert outcomes["parameters", "embed"] == "split in 4"
    assert outcomes["parameters", "experts"] == "no tensor has this dim"
    assert outcomes["parameters", "ffn"] == "not split: one device along it"
    over = {r.axes: r for r in placed.replicated(params)}
    matrices = sum(p.state_bytes for p in params if p.replicated == ("data",))
    assert (over["data",].n_bytes, over["data",].cost_bytes) == (matrices, matrices // 2)
    # Three norms of 32, two of them in both layers, with two moments, on 8 devices instead of one.
    assert (over["data", "fsdp"].n_bytes, over["data", "fsdp"].cost_bytes) == (12 * 5 * 32, 12 * 5 * 32 * 7 // 8)


@pytest.mark.parametrize("layout", ["fsdp=8", "data=2,fsdp=2,context=2,ring=1"])
def test_a_sound_layout_surprises_nobody(layout, tmp_path, capsys):
    found = explained(tmp_path, capsys, layout=layout, model=SMALL | {"n_layers": "4"}, remat="none")
    assert [c for c in found["collectives"] if c["surprise"]] == []
    assert found["rematerializations"] == []
    assert all(c["origin"]["where"] or c["step_bytes"] < 1000 for c in found["collectives"])
    weights = [c for c in found["collectives"] if c["kind"] == "all-gather" and "fsdp" in c["axis"]]
    # Of 4 layers three matrices of the feed-forward and four of attention, and the table of tokens, once each.
    assert sum(c["step_bytes"] for c in weights) == 4 * (4 * (3 + 4) * 32 * 32 + 264 * 32)
    assert max(c["times"] for c in weights) >= 3


def test_a_bad_placement_is_flagged_with_its_line(tmp_path, capsys, monkeypatch, eight_devices):
    """A layer whose output somebody wants whole on every device."""
    true = Layer.__call__

    def whole(self, x, *args, **kwargs):
        out = true(self, x, *args, **kwargs)
        if not isinstance(self.shard, OnMesh):
            return out
        everywhere = NamedSharding(self.shard.mesh, PartitionSpec())
        stream = out[0] if isinstance(out, tuple) else out
        stream = jax.lax.with_sharding_constraint(stream, everywhere)  # the line
        return (stream, *out[1:]) if isinstance(out, tuple) else stream

    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# the line"))
    monkeypatch.setattr(Layer, "__call__", whole)
    found = explained(tmp_path, capsys, layout="fsdp=8")
    by_hand = [a for a in found["activations"] if not a["dims"]]
    assert {a["where"] for a in by_hand} == {f"tests/experiments/test_explain.py:{line}"}
    assert by_hand[0]["replicated_over"] == ["fsdp"]
    surprising = [c for c in found["collectives"] if c["surprise"]]
    assert surprising
    assert f"tests/experiments/test_explain.py:{line}" in {c["origin"]["where"] for c in surprising}
    assert {(c["axis"], c["kind"]) for c in surprising} >= {("fsdp", "all-gather")}
    assert all("no rule" in c["surprise"] and c["hint"] for c in surprising)


def test_an_involuntary_rematerialization_is_caught(tmp_path, capfd, clumsy):
    asked = layouts.LayoutsRequest(
        explain=True, json=True, layout="pipeline=2,context=2,tensor=2", seq_len=64, remat="none", out=str(tmp_path / "none"),
    )  # fmt: skip
    assert layouts.main(asked) == 0
    told = capfd.readouterr()
    assert "Involuntary" not in told.err
    (warned,) = json.loads(told.out)["rematerializations"]
    assert (warned["tensor"], warned["n_bytes"], warned["times"]) == ("f32[1,8,64,128]", 4 * 8 * 64 * 128, 4)
    assert warned["origin"]["dims"] == ["batch", "sequence", "embed"]
    assert warned["origin"]["module"].endswith("layer_0")
    assert warned["origin"]["phase"] == "backward"
    first, *_ = warned["origin"]["where"].split(" or ")  # what gathers the stream at once has the same path
    file, _, line = first.partition(":")
    assert "shard.activation" in Path(file).read_text().splitlines()[int(line) - 1]
    assert warned["given"] == "1x1x4x1"


def test_what_else_is_written_meanwhile_is_passed_on(capfd):
    with compiler.heard() as warnings:
        os.write(2, b"[SPMD] Involuntary full rematerialization. Of something.\nE0101 00:00:00.1 7 a.cc:1] other\n")
        os.write(2, b"W0101 00:00:00.1 7 hlo_rematerialization.cc:1] memory\n")
    assert capfd.readouterr().err == "E0101 00:00:00.1 7 a.cc:1] other\n"
    assert len(warnings) == 1
    with pytest.raises(OSError, match="Bad file"), compiler.heard():  # the compiler fails
        os.write(2 * os.write(2, b"before\n") + 10_000, b"")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_lines_are_read_in_both_of_xlas_forms():
    tables = (
        'HloModule m, is_scheduled=true\n\nFileNames\n1 "/x/site-packages/a.py"\n2 "ROOT/transformer/layers.py"\n'
        '3 "ROOT/transformer/placement.py"\n\nFunctionNames\n1 "main"\n2 "f"\n\nFileLocations\n'
        "1 {file_name_id=1 function_name_id=1 line=5 end_line=5 column=1 end_column=2}\n"
        "2 {file_name_id=2 function_name_id=2 line=92 end_line=92 column=1 end_column=2}\n"
        "3 {file_name_id=3 function_name_id=2 line=7 end_line=7 column=1 end_column=2}\n\nStackFrames\n"
        "1 {file_location_id=1 parent_frame_id=1}\n2 {file_location_id=2 parent_frame_id=2}\n"
        "3 {file_location_id=3 parent_frame_id=3}\n\n"
    ).replace("ROOT", str(Path(__file__).parents[2]))
    sources = Sources(tables)
    name = 'op_name="jit(_step)/transpose(jvp(Decoder))/layer_0/ffn/[batch,length,ffn]/sharding_constraint"'
    for metadata in (
        name + " stack_frame_id=3",
        name + f' source_file="{Path(__file__).parents[2]}/transformer/layers.py" source_line=92',
    ):
        origin = sources.origin(metadata)
        assert (origin.module, origin.where, origin.phase) == (
            "Decoder/layer_0/ffn",
            "transformer/layers.py:92",
            "backward",
        )
        assert origin.dims == ("batch", "length", "ffn")


@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ("source_target_pairs={{0,4},{1,5},{2,6},{3,7},{4,0},{5,1},{6,2},{7,3}}", "pipeline"),
        ("source_target_pairs={{0,0},{1,1},{4,2},{5,3},{2,4},{3,5},{6,6},{7,7}}", "pipeline_context"),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", "context"),
        ("source_target_pairs={{0,3},{3,4},{4,7},{7,0}}", "pipeline_context_tensor"),
        ("source_target_pairs={{0,4},{1,3},{4,0},{3,1}}", "pipeline_context"),  # not of the farthest pair alone
        ("source_target_pairs={{5,5}}", "self"),
        ("replica_groups=[4,2]<=[8]", "tensor"),
    ],
)
def test_axes_that_a_permutation_crosses(attributes, name):
    assert axis_of_collective(attributes, Layout(pipeline=2, context=2, tensor=2)) == name


@pytest.mark.parametrize(("rows", "surprise"), [(2, None), (8, "no rule sends collective-permutes along fsdp")])
def test_weights_that_go_around_a_ring_beside_their_product_are_gathered(rows, surprise):
    """As the TPU compiler writes it: a part of [8, 16] over four devices at a time, and not the whole."""
    layout = Layout(fsdp=4)
    text = f"""HloModule ring, is_scheduled=true

ENTRY %main (p: f32[{rows},16]) -> f32[{rows},16] {{
  %p = f32[{rows},16]{{1,0}} parameter(0)
  ROOT %r = f32[{rows},16]{{1,0}} collective-permute(%p), source_target_pairs={{{{0,1}},{{1,2}},{{2,3}},{{3,0}}}}
}}
"""
    weight = placed.Placed("w", ("embed", "ffn"), "f32", (8, 16), (("fsdp",), ()), layout)
    (sent,) = collectives.collectives(text, hlo.parse(text), layout, [weight])
    assert (sent.axis, sent.n_bytes, sent.surprise) == ("fsdp", 4 * rows * 16, surprise)


def test_tables_are_readable_at_the_width_of_a_terminal(capsys, clumsy):
    asked = layouts.LayoutsRequest(explain=True, layout="fsdp=4,tensor=2", seq_len=64, model=SMALL | {"d_model": "64"})
    assert layouts.main(asked) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 136
    for words in ("64/fsdp embed", "Surprising", "all-to-all", "attention.py:", "Copies", "Compiled"):
        assert words in told, words


def test_bad_requests_of_an_explanation():
    with pytest.raises(RequestError, match="--device=h100-sxm is of --explain"):
        layouts.LayoutsRequest(device="h100-sxm")
    with pytest.raises(RequestError, match="does not divide"):
        layouts.main(layouts.LayoutsRequest(explain=True, layout="tensor=8", model=SMALL | {"d_ff": "36"}))


@pytest.mark.deviceless
def test_gradients_that_are_summed_end_to_end_surprise_nobody(tmp_path, capsys):
    """XLA:GPU concatenates what it sums over replicas."""
    found = explained(tmp_path, capsys, device="h100-sxm", model={"n_layers": "3"}, seq_len=64)
    layer = 4 * 128 * 128 + 3 * 128 * 384
    assert f"bf16[{layer}]" in {c["tensor"] for c in found["collectives"]}
    assert {c["kind"] for c in found["collectives"]} == {"all-reduce"}
    assert [c for c in found["collectives"] if c["surprise"]] == []


@pytest.mark.deviceless
def test_a_forecast_says_what_the_compiler_gathers_whole(tmp_path, capfd, clumsy):
    asked = ForecastRequest(
        layout="pipeline=2,context=2,tensor=2", devices=(8,), seq_len=64, remat="none", model={"n_layers": "2"},
        out=str(tmp_path),
    )  # fmt: skip
    assert forecast_main(asked) == 0
    told = capfd.readouterr()
    (record,) = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    (warned,) = record["warnings"]
    assert warned["tensor"] == "bf16[1,8,64,128]"
    assert f"{warned['times']} times, first at {warned['origin']['where']}" in " ".join(told.out.split())
    assert "Involuntary" not in told.err
