"""Residual streams: every topology, the feature axis, the drawings, linear cost."""

import itertools
import operator
import xml.etree.ElementTree as ET

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from normfuse import passes
from normfuse.passes import ir
from normfuse.passes.axis import Axis, operands, result_axis, through_reshape, users
from normfuse.passes.residual import streams
from normfuse.passes.zero_mean import centered_streams
from properties import calls
from stream_models import Attention, EncoderDecoder, LowPrecision, Mlp, Toy
from torch import nn

aten, nf = torch.ops.aten, torch.ops.normfuse


def analysed(model, args, **kwargs):
    gm = passes.capture(model, args, **kwargs)
    return gm, streams(gm)


def only(model, args=None):
    _, found = analysed(model, args if args is not None else model.example())
    assert len(found) == 1
    return found[0]


def kinds(stream):
    return [w.kind for w in stream.writers]


def modules(items):
    return [ir.module_path(i.node) for i in items]


# -- topologies


def test_pre_norm():
    s = only(Toy().eval())
    assert kinds(s) == ["embedding", "embedding", "linear", "linear", "linear", "linear"]
    assert modules(s.norms) == [
        "blocks.0.norm1",
        "blocks.0.norm2",
        "blocks.1.norm1",
        "blocks.1.norm2",
        "norm",
    ]
    assert (len(s.adds), s.raw_readers, s.taps, s.width) == (5, [], [], 8)
    assert all(w.source is w.node and not w.gates for w in s.writers)


def test_parallel_blocks_share_a_norm():
    s = only(Toy(styles=("parallel", "parallel")).eval())
    assert modules(s.norms) == ["blocks.0.norm1", "blocks.1.norm1", "norm"]
    assert kinds(s).count("linear") == 4 and len(s.adds) == 5


def test_sandwich_norms_are_writers_and_read_streams_of_their_own():
    _, found = analysed(m := Toy(styles=("sandwich",)).eval(), m.example())
    main = next(s for s in found if len(s.norms) == 3)
    branches = [s for s in found if s is not main]
    assert kinds(main) == ["embedding", "embedding", "norm", "norm"]
    assert [modules(s.norms) for s in branches] == [["blocks.0.post1"], ["blocks.0.post2"]]
    assert [kinds(s) for s in branches] == [["linear"], ["linear"]]


def test_post_norm_streams_end_at_each_norm():
    _, found = analysed(m := Toy(styles=("post", "post")).eval(), m.example())
    # embeddings+branch | three more sums | the last norm's output, read by the final norm
    assert [len(s.norms) for s in found] == [1, 1, 1, 1, 1]
    assert kinds(found[0]) == ["embedding", "embedding", "linear"]
    assert [kinds(s) for s in found[1:4]] == [["norm", "linear"]] * 3
    assert kinds(found[4]) == ["norm"]
    # q, k and v look at the un-normalized embeddings
    assert len(found[0].raw_readers) == 3
    assert "linear map of the un-normalized stream" in found[0].raw_readers[0].reason


def test_mix_ln():
    _, found = analysed(m := Toy(styles=("post", "pre", "pre")).eval(), m.example())
    suffix = found[-1]
    assert kinds(suffix) == ["norm"] + ["linear"] * 4
    assert modules(suffix.writers)[0] == "blocks.0.norm2"
    assert len(suffix.norms) == 5 and not suffix.raw_readers


def test_class_token_positions_and_patches():
    s = only(Toy(entry="patches").eval())
    assert sorted(kinds(s)[:3]) == ["conv", "weight", "weight"]
    labels = [w.label for w in s.writers if w.kind == "weight"]
    assert labels == ["cls", "place"]
    conv = next(w for w in s.writers if w.kind == "conv")
    # channels first at the convolution, channels last at the norm
    assert conv.axis == Axis((-3,)) and s.norms[0].axis == Axis((-1,))
    assert [n for n, d in s.graph.nodes(data=True) if d["kind"] == "cat"]


def test_taps_are_reported():
    s = only(Toy(tap=True).eval())
    assert len(s.taps) == 2 and not s.raw_readers
    assert {t.node.op for t in s.taps} == {"output"}


def test_layer_scale_is_a_gate_of_its_writer():
    s = only(Toy(layer_scale=True).eval())
    linears = [w for w in s.writers if w.kind == "linear"]
    assert len(linears) == 4
    for w in linears:
        assert [ir.is_call(g, aten.mul) for g in w.gates] == [True]
        assert w.linear.node is w.source and w.source is not w.node


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_transparent_only_when_inactive(training):
    s = only(Toy(dropout=0.1).train(training))
    linears = [w for w in s.writers if w.kind == "linear"]
    assert len(linears) == 4
    assert all(bool(w.gates) == training for w in linears)
    # an active dropout after the embeddings ends the stream there
    assert kinds(s)[0] == ("op" if training else "embedding")
    assert all(any(ir.is_call(n, aten.dropout) for n in s.between(w)) for w in linears)


def test_dropout_with_p_zero_is_transparent_in_training():
    s = only(Toy(dropout=0.0).train())
    assert kinds(s)[0] == "embedding" and not any(w.gates for w in s.writers)


def test_tied_head_leaves_the_stream_alone():
    s = only(Toy(tied=True).eval())
    table = s.writers[0].source.args[0]
    assert len(table.users) == 2 and not s.raw_readers


def test_encoder_decoder_has_two_streams():
    _, found = analysed(m := EncoderDecoder().eval(), m.example())
    assert [modules(s.norms) for s in found] == [
        ["enc_norm", "enc_final"],
        ["dec_norm", "dec_final"],
    ]
    # the memory enters the decoder through the cross attention's output only
    assert kinds(found[1]) == ["embedding", "linear"] and not found[1].raw_readers


def test_casts_and_in_place_adds():
    s = only(LowPrecision().eval())
    assert kinds(s) == ["embedding", "linear", "linear"]
    assert len(s.norms) == 3 and len(s.adds) == 2 and not s.raw_readers
    # the casts around the norms belong to the norms
    assert {ir.dtype(v) for v in s.values} == {torch.bfloat16}
    assert {ir.NormArgs(r.node).stat_dtype for r in s.norms} == {torch.float32}


def test_norm_right_after_a_linear():
    s = only(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), (torch.ones(3, 4),))
    assert kinds(s) == ["linear"] and len(s.norms) == 1 and not s.adds


def test_query_key_norms_see_heads():
    _, found = analysed(Attention(8, qk_norm=True), (torch.randn(2, 3, 8),))
    assert [modules(s.norms) for s in found] == [["q_norm"], ["k_norm"]]
    for s in found:
        # the linear's eight outputs are two heads of four features
        assert s.width == 4
        assert s.writers[0].axis == Axis((-1,), outer=2)


def test_a_second_norm_kind_and_another_axis():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.ln, self.rms = nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4)
            self.tokens = nn.LayerNorm(3)

        def forward(self, x):
            x = self.lin(x)
            return self.ln(x) + self.rms(x) + self.tokens(x.mT).mT

    _, found = analysed(Mixed(), (torch.randn(2, 3, 4),))
    main = found[0]
    assert [r.node.target for r in main.norms] == [
        nf.layer_norm.default,
        nf.rms_norm.default,
    ]
    assert ["over dims" in r.reason for r in main.raw_readers] == [True]
    other = next(s for s in found if s.width == 3)
    assert modules(other.norms) == ["tokens"]


def test_shape_only_readers_do_not_count():
    class Shapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln = nn.LayerNorm(4)

        def forward(self, x):
            x = x * 2
            mask = torch.zeros_like(x[..., 0])
            return self.ln(x).sum(-1) + mask + x.shape[1]

    s = only(Shapes(), (torch.randn(2, 3, 4),))
    assert kinds(s) == ["input"] and not s.raw_readers and not s.taps


def test_swapped_axes_of_one_value_are_reported():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln = nn.LayerNorm(4)

        def forward(self, x):
            return self.ln(x + x.mT)

    s = only(Square(), (torch.randn(2, 4, 4),))
    assert any("two different axes" in r.reason for r in s.raw_readers)


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda x: torch.tanh(x), "reads the un-normalized stream"),
        (lambda x: x * torch.arange(1.0, 5.0), "channel by channel"),
        (lambda x: torch.dropout(x, 0.5, True), "drops single features"),
        (lambda x: x + 1.0, "reads the un-normalized stream"),
        (lambda x: x * x, "reads the un-normalized stream"),
        (lambda x: x.clamp(-3, 3), "reads the un-normalized stream"),
        (lambda x: x[..., :2].sum(), "reads the un-normalized stream"),
        (lambda x: torch.ones(3, 3) @ x @ torch.ones(4, 4), "linear map"),
    ],
)
def test_raw_readers(operation, reason):
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.ln = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            x = self.lin(x)
            return self.ln(x), operation(x)

    s = only(Raw(), (torch.randn(2, 3, 4),))
    assert len(s.raw_readers) == 1 and reason in s.raw_readers[0].reason


def test_fused_residual_norms():
    gm, _ = analysed(m := Toy().eval(), m.example())
    for norm in [n for n in ir.norm_nodes(gm) if n.args[0].target is aten.add.Tensor]:
        add = norm.args[0]
        args = ir.NormArgs(norm).replaced(x=add.args[0], residual=add.args[1])
        with gm.graph.inserting_before(add):
            both = ir.emit(gm.graph, nf.add_layer_norm.default, like=norm, **args)
            both.meta["site"] = norm.meta["site"]
            out = ir.emit(gm.graph, operator.getitem, both, 0)
            total = ir.emit(gm.graph, operator.getitem, both, 1)
        ir.replace(norm, out)
        ir.replace(add, total)
    ir.stable_sort(gm.graph)
    ir.erase_dead(gm)
    ir.check(gm)
    (s,) = streams(gm)
    assert kinds(s) == ["embedding", "embedding"] + ["linear"] * 4
    assert len({r.node for r in s.norms}) == 5 and not s.raw_readers


# -- zero means


def test_centered_by_construction():
    class Centered(nn.Module):
        def __init__(self, affine):
            super().__init__()
            self.first = nn.LayerNorm(4, elementwise_affine=affine)
            self.second = nn.RMSNorm(4, elementwise_affine=affine)

        def forward(self, x):
            return self.second(self.first(x))

    x = (torch.randn(3, 4),)
    for affine in (False, True):
        _, found = analysed(Centered(affine), x)
        assert centered_streams(found) == [False, not affine]


# -- the axis


@st.composite
def reshapes(draw):
    """Two factorizations of one number of elements, and a dim of the first."""
    primes = draw(st.lists(st.sampled_from([2, 3, 5]), min_size=1, max_size=5))
    cuts = [draw(st.lists(st.integers(0, len(primes)), max_size=4)) for _ in range(2)]
    shapes = []
    for cut in cuts:
        edges = [0, *sorted(cut), len(primes)]
        shape = []
        for a, b in itertools.pairwise(edges):
            n = 1
            for p in primes[a:b]:
                n *= p
            shape.append(n)
        shapes.append(tuple(shape))
    return (*shapes, draw(st.integers(-len(shapes[0]), -1)))


def feature_index(shape, axis):
    """The feature number of every element."""
    n = axis.size(shape)
    out = torch.zeros(shape, dtype=torch.long)
    if len(axis.dims) == 1:
        view = [1] * len(shape)
        view[axis.dims[0]] = shape[axis.dims[0]]
        index = torch.arange(shape[axis.dims[0]]) // axis.inner % n
        return out + index.reshape(view)
    for d in axis.dims:
        view = [1] * len(shape)
        view[d] = shape[d]
        out = out * shape[d] + torch.arange(shape[d]).reshape(view)
    return out


@settings(max_examples=200, deadline=None, derandomize=True)
@given(reshapes())
def test_reshape_keeps_feature_numbers(case):
    source, target, dim = case
    axis = Axis((dim,))
    found = through_reshape(source, target, axis)
    index = feature_index(source, axis).reshape(target)
    if found is not None:
        assert torch.equal(feature_index(target, found), index)
        # and back again
        back = through_reshape(target, source, found)
        assert back is not None and torch.equal(
            feature_index(source, back), feature_index(source, axis)
        )
    else:
        # a broken-up axis is constant along no whole dim of the target
        for d in range(-len(target), 0):
            for outer in (k for k in range(1, target[d] + 1) if target[d] % k == 0):
                n = source[dim]
                if (target[d] // outer) % n == 0:
                    guess = Axis((d,), outer, target[d] // outer // n)
                    assert n == 1 or not torch.equal(feature_index(target, guess), index)


TRANSPARENT = {
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(2, 1, 0),
    "movedim": lambda x: x.movedim(-1, 0),
    "flatten": lambda x: x.flatten(0, 1),
    "heads": lambda x: x.unflatten(0, (2, 2)).transpose(1, 2),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "expand": lambda x: x[:, None].expand(-1, 3, -1, -1),
    "slice": lambda x: x[1:3, ::2],
    "select": lambda x: x[:, 0],
    "index": lambda x: x[torch.tensor([2, 0, 1])],
    "index2": lambda x: x[torch.tensor([2, 0]), torch.tensor([0, 1])],
    "cat": lambda x: torch.cat([x, 2 * x], 1),
    "stack": lambda x: torch.stack([x, x.flip(0)], 1),
    "split": lambda x: x.split(2, 0)[1],
    "unbind": lambda x: x.unbind(1)[1],
    "pad": lambda x: nn.functional.pad(x, (0, 0, 1, 1)),
    "roll": lambda x: x.roll(1, 0),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "mean": lambda x: x.mean(0),
    "sum": lambda x: x.sum(1, keepdim=True),
    "cumsum": lambda x: x.cumsum(0),
    "rows": lambda x: x * torch.arange(1.0, 5.0, dtype=x.dtype)[:, None, None],
    "divide": lambda x: x / 3,
    "subtract": lambda x: x - 0.5 * x.flip(0),
    "mask": lambda x: x.masked_fill(torch.arange(4)[:, None, None] > 2, 0.0),
    "where": lambda x: torch.where(torch.arange(4)[:, None, None] > 1, x, x.flip(1)),
    "mix": lambda x: torch.ones(4, 3, 3, dtype=x.dtype).tril() @ x,
    "pool": lambda x: nn.functional.avg_pool1d(x.permute(0, 2, 1), 3),
    "index_add": lambda x: x.index_add(0, torch.tensor([0, 2]), x[:2]),
    "cast": lambda x: x.to(torch.float32).to(torch.float64),
}
OPAQUE = {
    "feature transpose": lambda x: x.reshape(4, 15)[:, :10].reshape(4, 2, 5),
    "feature slice": lambda x: x[..., 1:],
    "feature mean": lambda x: x.mean(-1),
    "feature flip": lambda x: x.flip(-1),
    "feature cat": lambda x: torch.cat([x, x], -1),
    "square": lambda x: x * x,
    "constant": lambda x: x + 1,
    "channel": lambda x: x * torch.arange(1.0, 6.0, dtype=x.dtype),
    "relu": lambda x: x.relu(),
    "max": lambda x: x.amax(0),
    "pad with one": lambda x: nn.functional.pad(x, (0, 0, 1, 1), value=1.0),
    "fill with one": lambda x: x.masked_fill(torch.arange(4)[:, None, None] > 2, 1.0),
    "cumsum": lambda x: x.cumsum(-1),
    "pool": lambda x: nn.functional.avg_pool1d(x, 3),
    "linear": lambda x: x @ torch.ones(5, 5, dtype=x.dtype),
    "index": lambda x: x[..., torch.tensor([4, 3, 2, 1, 0])],
}


def follow(operation):
    """The axis of the result, walked from the input; ``None`` if the features do not arrive."""
    gm = passes.capture(lambda x: operation(x), (torch.randn(4, 3, 5).double(),))
    start = next(n for n in gm.graph.nodes if n.op == "placeholder" and ir.is_tensor(n))
    axes = {start: Axis((-1,))}
    for node in gm.graph.nodes:
        for value in [v for v in axes if node in set(users(v)) and node not in axes]:
            found = result_axis(node, value, axes[value])
            if found is not None and node not in axes:
                links = operands(node, found)
                # operands of an add arrive one by one: all must belong
                if all(o in axes and axes[o] == a for o, a in links):
                    axes[node] = found
    out = next(n for n in gm.graph.nodes if n.op == "output").all_input_nodes
    return gm, axes.get(out[0])


def center(x, axis):
    return x - x.mean(axis.dims, keepdim=True)


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_ops_commute_with_centering(name):
    gm, axis = follow(TRANSPARENT[name])
    assert axis is not None and axis.whole
    x = torch.randn(4, 3, 5).double()
    torch.testing.assert_close(
        gm(center(x, Axis((-1,)))), center(gm(x), axis), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_ops_are_not_followed(name):
    assert follow(OPAQUE[name])[1] is None


# -- drawings


def test_drawings():
    s = only(Toy(styles=("pre", "parallel"), layer_scale=True, tap=True).eval())
    text = s.to_text()
    assert "blocks.0.norm1 (layer_norm)" in text and "══▶ output" in text and "via mul" in text
    assert max(map(len, text.splitlines())) <= 100
    root = ET.fromstring(s.to_svg())
    words = "".join(root.itertext())
    for label in ("blocks.1.mlp.down", "blocks.1.norm1", "embed", "norm (layer_norm)"):
        assert label in words
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == len(s.adds)
    dot = s.to_dot()
    assert dot.startswith("digraph") and dot.count("->") == s.graph.number_of_edges()
    assert set(s.drawing()) == {"name", "text", "svg"}


def test_skeleton_is_a_connected_acyclic_graph():
    _, found = analysed(m := Toy(styles=("pre", "sandwich"), entry="patches").eval(), m.example())
    for s in found:
        assert nx.is_directed_acyclic_graph(s.graph)
        assert nx.number_weakly_connected_components(s.graph) == 1
        roles = nx.get_node_attributes(s.graph, "role")
        assert sum(r == "writer" for r in roles.values()) == len(s.writers)
        assert sum(r == "reader" for r in roles.values()) == len(s.readers)


def test_long_streams_are_elided():
    gm = tall(400)
    (s,) = streams(gm)
    assert "more" in s.to_text() and len(s.to_text().splitlines()) < 300
    assert len(s.to_svg()) < 200_000


# -- cost


def tall(blocks, d=8):
    """A pre-norm graph of ``blocks`` blocks, built by copying the fake values of the first."""
    seed = Mlp(d).eval()

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln, self.mlp = nn.LayerNorm(d), seed

        def forward(self, x):
            return self.ln(x + self.mlp(self.ln(x)))

    gm = passes.capture(One(), (torch.randn(2, 3, d),))
    graph = gm.graph
    add = next(n for n in graph.nodes if ir.is_call(n, aten.add))
    body = [n for n in graph.nodes if n.op == "call_function"]
    body = body[: body.index(add) + 1]
    x = next(a for a in body[0].all_input_nodes if a.meta["kind"] == "input")
    last = add
    for i in range(blocks - 1):
        env, behind = {x: last}, last
        for node in body:
            with graph.inserting_after(behind):
                new = graph.node_copy(node, lambda n, env=env: env.get(n, n))
            new.meta = dict(node.meta)
            if "site" in new.meta:
                new.meta["site"] = f"{new.meta['site']}#{i + 2}"
            env[node] = behind = new
        last = env[add]
    readers = [n for n in ir.norm_nodes(gm) if n.args[0] is add]
    final = next(n for n in readers if not any(ir.is_call(u, aten.linear) for u in n.users))
    final.replace_input_with(add, last)
    ir.check(gm)
    return gm


def test_cost_is_linear_in_depth():
    counts = []
    for depth in (250, 1000):
        gm = tall(depth)
        counts.append(calls(lambda gm=gm: centered_streams(streams(gm))))
    assert counts[1] < 4.5 * counts[0]
    (s,) = streams(gm)
    assert len(s.norms) == 1001 and len(s.adds) == 1000
    assert s.graph.number_of_nodes() == len(s.writers) + len(s.adds) + len(s.readers)


# -- real architectures


def test_transformers_models():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ids = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]])}
    t = transformers
    cases = {
        "gpt2": (
            t.GPT2LMHeadModel(t.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32)),
            [(6, 5, 0, 0)],
        ),
        "gpt_neox": (
            t.GPTNeoXForCausalLM(t.GPTNeoXConfig(vocab_size=32, **small)),
            [(5, 5, 0, 0)],
        ),
        "phi": (t.PhiForCausalLM(t.PhiConfig(vocab_size=32, **small)), [(5, 3, 0, 0)]),
        "bert": (
            t.BertModel(t.BertConfig(vocab_size=32, **small)),
            [(3, 1, 0, 0), (2, 1, 3, 0), (2, 1, 1, 0), (2, 1, 3, 0), (2, 1, 1, 0)],
        ),
    }
    for name, (model, expected) in cases.items():
        gm = passes.capture(model.eval(), (), ids)
        got = [(len(s.writers), len(s.norms), len(s.raw_readers), len(s.taps)) for s in streams(gm)]
        assert got == expected, name


def test_gemma2_sandwich():
    t = pytest.importorskip("transformers")
    config = t.Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
    )
    model = t.Gemma2ForCausalLM(config).eval()
    gm = passes.capture(model, (), {"input_ids": torch.tensor([[3, 4, 5]])})
    main, *branches = sorted(streams(gm), key=lambda s: -len(s.norms))
    assert kinds(main) == ["embedding"] + ["norm"] * 4 and len(main.norms) == 5
    assert [kinds(s) for s in branches] == [["linear"]] * 4
