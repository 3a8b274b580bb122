"""Checkpointed regions are rewritten and still recomputed; other higher-order ops stay opaque."""

import contextlib
import warnings
from contextlib import contextmanager

import normfuse
import pytest
import torch
from normfuse import passes
from normfuse.passes import ir, subgraphs
from normfuse.runtime import backend
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

ALWAYS = {"policy": "always", "strict": True}
D = 8


class Block(nn.Module):
    """Pre-LN attention-free decoder block with dropout."""

    def __init__(self, p=0.0, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(D), norm(D)
        self.mix, self.up, self.down = nn.Linear(D, D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        x = x + self.drop(self.mix(self.norm1(x)).cumsum(1))
        return x + self.drop(self.down(torch.relu(self.up(self.norm2(x)))))


class Decoder(nn.Module):
    def __init__(self, p=0.0, layers=2, norm=nn.LayerNorm, checkpointed=True, **options):
        super().__init__()
        self.embed = nn.Embedding(16, D)
        self.blocks = nn.ModuleList([Block(p, norm) for _ in range(layers)])
        self.norm, self.head = norm(D), nn.Linear(D, 16, bias=False)
        self.checkpointed, self.options = checkpointed, options
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for q in self.parameters():
                q.copy_(torch.randn(q.shape, generator=generator) * 0.5)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            if self.checkpointed:
                x = checkpoint(block, x, use_reentrant=False, **self.options)
            else:
                x = block(x)
        return self.head(self.norm(x))


def keep_products():
    def policy(ctx, op, *args, **kwargs):
        save = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


IDS = torch.arange(12).view(2, 6) % 16
OPTIONS = {"plain": {}, "selective": {"context_fn": keep_products}}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    backend.clear_reports()
    with torch._inductor.config.patch(fallback_random=True):  # the random numbers of eager
        yield
    torch._dynamo.reset()


@pytest.fixture
def aot(monkeypatch):
    """AOTAutograd with Inductor's partitioner and decompositions, but no code generation."""
    import torch._inductor.compile_fx as inductor
    from functorch.compile import make_boxed_func
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def partition(*args, **kwargs):
        return min_cut_rematerialization_partition(*args, compiler="inductor", **kwargs)

    def compile_fx(gm, inputs, **kwargs):
        return aot_module_simplified(
            gm,
            inputs,
            fw_compiler=lambda g, _: make_boxed_func(g),
            bw_compiler=lambda g, _: make_boxed_func(g),
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)


def step(f, model, *args):
    """Output and gradients of one training step, the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(3)
    out = f(*args)
    out.square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [out.detach(), *grads]


@contextmanager
def saved_activations(model, sizes):
    """Collects the sizes of what is kept for the backward pass besides parameters."""
    own = {p.data_ptr() for p in model.parameters()}

    def pack(t):
        if t.data_ptr() not in own:
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield


def kept(f, model, *args):
    """Number of elements kept for the backward pass besides parameters."""
    f(*args)  # compiled outside of the hooks
    sizes = []
    with saved_activations(model, sizes):
        f(*args)
    return sum(sizes)


def agree(a, b, rtol=1e-10, atol=1e-12):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def inductor(model):
    return torch.compile(model, backend=lambda g, i: torch._inductor.compile_fx.compile_fx(g, i))


def lies_in(sites, path):
    return {p for key, p in sites if key == path}


# ---------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_backend_rewrites_inside_checkpoints_and_keeps_recomputation(aot, options, p):
    model = Decoder(p, **OPTIONS[options]).double().train()
    eager = step(model, model, IDS)
    reference = kept(inductor(model), model, IDS)
    torch._dynamo.reset()
    options = {**ALWAYS, "passes": ["fold_affine", "remove_mean"]}
    fast = torch.compile(model, backend="normfuse", options=options)
    agree(step(fast, model, IDS), eager)
    [report] = backend.reports()
    for path in ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "norm"):
        assert "fold_affine" in lies_in(report.applied, path)
    assert any("test_subgraphs.py:" in s.where for s in report.sites)
    # nothing but a few numbers per row more than what Inductor keeps of the same model
    assert kept(fast, model, IDS) <= reference + 4 * IDS.numel()
    if p == 0.0 and not model.options:  # and much less than without checkpoints
        torch._dynamo.reset()
        model.checkpointed = False
        fast = torch.compile(model, backend="normfuse", options=options)
        assert kept(fast, model, IDS) > 2 * reference


def test_backend_through_inductor():
    """The real thing once, with dropout."""
    model = Decoder(0.4, layers=1).double().train()
    eager = step(model, model, IDS)
    fast = torch.compile(model, backend="normfuse", options=ALWAYS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        agree(step(fast, model, IDS), eager)
    assert backend.reports()[0].applied


def test_verification_and_every_pass_alone(aot):
    model = Decoder(norm=nn.RMSNorm).double().train()
    eager = step(model, model, IDS)
    for chosen in ("exact", ["defer_scale"], ["merge_linears"], ["fuse_residual_norm"]):
        torch._dynamo.reset()
        options = {**ALWAYS, "passes": chosen, "verify": True}
        agree(step(torch.compile(model, backend="normfuse", options=options), model, IDS), eager)
    refused = {r for _, p, r in backend.reports()[-1].refused if p == "fuse_residual_norm"}
    assert any("different checkpointed regions" in r for r in refused)  # block 1 reads block 0


def test_inference_ignores_checkpoints(aot):
    model = Decoder().double().eval()
    fast = torch.compile(model, backend="normfuse", options=ALWAYS)
    with torch.no_grad():
        torch.testing.assert_close(fast(IDS), model(IDS), rtol=1e-10, atol=1e-12)
    assert "remove_mean" in lies_in(backend.reports()[0].applied, "blocks.1.norm2")


class Nested(nn.Module):
    """A checkpoint around a checkpoint, a weight used inside and outside, sizes that vary."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = Decoder(layers=2), nn.LayerNorm(16)
        self.tied = nn.Linear(16, 16)

    def forward(self, ids):
        x = checkpoint(self.part, ids, use_reentrant=False)
        return self.tied(x) * ids.shape[1]

    def part(self, ids):
        return self.tied(self.outer(self.inner(ids))) / ids.shape[1]


def test_nested_and_tied_and_dynamic(aot):
    model = Nested().double().train()
    fast = torch.compile(model, backend="normfuse", options=ALWAYS, dynamic=True)
    for n in (6, 9):  # one graph for both
        ids = torch.arange(2 * n).view(2, n) % 16
        agree(step(fast, model, ids), step(model, model, ids))
    [report] = backend.reports()
    assert {"inner.blocks.0.norm1", "outer", "inner.norm"} <= {k for k, _ in report.applied}


def test_autocast_around_a_checkpoint(aot):
    model = Decoder().train()
    fast = torch.compile(model, backend="normfuse", options=ALWAYS)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = step(fast, model, IDS), step(model, model, IDS)
    assert ours[0].dtype == eager[0].dtype == torch.bfloat16
    for a, b in zip(ours, eager, strict=True):
        assert (a - b).abs().max() <= 0.1 * b.abs().max()
    assert backend.reports()[0].applied


# ---------------------------------------------------------------------------------------------
# rewrite


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_rewrite_keeps_checkpoints(options, p):
    model = Decoder(p, **OPTIONS[options]).double().train()
    new, report = normfuse.rewrite(model, (IDS,), policy="always", inplace=True, verify=p == 0.0)
    assert "fold_affine" in lies_in(report.applied, "blocks.1.norm1")
    agree(step(new, model, IDS), step(model, model, IDS))
    extra = sum(w.numel() for w in model.parameters() if w.dim() > 1)  # folded weights at most
    assert kept(new, model, IDS) <= kept(model, model, IDS) + extra
    inside = [m for m in new._captured[0][1]._train.modules()]
    assert sum(isinstance(m, subgraphs.Checkpointed) for m in inside) == 2
    with torch.no_grad():
        torch.testing.assert_close(new.eval()(IDS), model.eval()(IDS))


def test_rewritten_checkpoints_compile_again():
    model = Decoder(0.4).double().train()
    new, _ = normfuse.rewrite(model, (IDS,), policy="always", inplace=True, verify=False)
    seen = []

    def look(gm, inputs):
        seen.extend(str(n.target) for n in gm.graph.nodes if n.op == "call_function")
        return gm

    torch.compile(new, backend=look, fullgraph=True)(IDS)
    assert seen.count("tag_activation_checkpoint") == 2


def test_baked_checkpoints_recompute():
    model = Decoder(0.4).double().train()
    new, _ = normfuse.rewrite(model, (IDS,), policy="always", weights="baked", verify=False)
    names = [type(m) for m in new.graph_module.modules()]
    assert names.count(subgraphs.Checkpointed) == 2
    torch.manual_seed(3)
    ours = new(IDS)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, model(IDS), rtol=1e-10, atol=1e-12)


def test_reentrant_checkpoints_keep_their_gradients():
    model = Decoder(0.4).double().train()
    torch_options, model.checkpointed = {"use_reentrant": True}, False
    model.blocks = nn.ModuleList([Reentrant(b, torch_options) for b in model.blocks])
    new, _ = normfuse.rewrite(model, (IDS,), policy="always", inplace=True, verify=False)
    agree(step(new, model, IDS), step(model, model, IDS))


class Reentrant(nn.Module):
    def __init__(self, block, options):
        super().__init__()
        self.block, self.options = block, options

    def forward(self, x):
        return checkpoint(self.block, x, **self.options)


def test_rewrite_runs_the_original_where_a_custom_backward_would_be_lost():
    def tripled(model, x):  # a backward that is not the derivative of its forward
        return Tripled.apply(x)

    model = Around(tripled).double().eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    new, report = normfuse.rewrite(model, (x,), policy="always", inplace=True)
    assert report.applied and "autograd.Function Tripled" in report.notes[0]
    with pytest.warns(UserWarning, match="no backward of Tripled"):
        ours = step(new, model, x)
    agree(ours, step(model, model, x))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(new(x), expected, rtol=1e-10, atol=1e-12)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return 3 * g


def test_capture_tags_regions_and_runs_them_in_line():
    model = Decoder().train()
    gm = passes.capture(model, (IDS,))
    regions = [n.meta.get("region") for n in ir.norm_nodes(gm)]
    assert regions == [0, 0, 1, 1, None]
    torch.testing.assert_close(gm(IDS), model(IDS))
    subgraphs.dissolve(gm)
    assert not subgraphs.has_regions(gm)


def test_outline_refuses_what_would_reorder_random_numbers():
    model = Decoder(0.5, layers=1).train()
    gm = passes.capture(model, (IDS,))
    drops = [n for n in gm.graph.nodes if ir.is_call(n, torch.ops.aten.dropout.default)]
    assert len(drops) == 2
    for n in gm.graph.nodes:
        if n.meta.get("region") == 0 and n.op == "call_function" and n is not drops[0]:
            if n not in (drops[1], *drops[1].users):
                n.meta.pop("region")
    # the two dropouts are one region again, and a third one in between is not
    with gm.graph.inserting_before(drops[1]):
        ir.emit(gm.graph, torch.ops.aten.dropout.default, drops[0].args[0], 0.5, True)
    with pytest.raises(passes.CaptureError, match="reorder random numbers"):
        subgraphs.outline(gm, subgraphs.emit_eager)


def test_outline_refuses_regions_tied_together():
    gm = passes.capture(Decoder(layers=2).train(), (IDS,))
    second = [n for n in gm.graph.nodes if n.meta.get("region") == 1]
    second[len(second) // 2].meta["region"] = 0  # each now runs before and after the other
    with pytest.raises(passes.CaptureError, match="ties two checkpointed regions"):
        subgraphs.outline(gm, subgraphs.emit_eager)


@pytest.mark.parametrize("how", ["backend", "rewrite"])
def test_transformers_gradient_checkpointing(aot, how):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()

    def run(f):
        return lambda ids: f(input_ids=ids, use_cache=False).logits

    eager = step(run(model), model, IDS)
    if how == "backend":
        new = torch.compile(model, backend="normfuse", options=ALWAYS)
    else:
        new, report = normfuse.rewrite(
            model, (), {"input_ids": IDS, "use_cache": False}, policy="always", inplace=True
        )
    agree(step(run(new), model, IDS), eager, rtol=1e-3, atol=1e-6)  # its norms are in float32
    if how == "backend":
        [report] = backend.reports()
    assert "fold_affine" in lies_in(report.applied, "model.layers.1.input_layernorm")
    if how == "backend":
        torch._dynamo.reset()
        reference = inductor(model)
        bound = 16 * IDS.numel()  # the product of the head, unscaled
    else:
        reference = model
        bound = sum(w.numel() for w in model.parameters() if w.dim() > 1)  # folded weights
    assert kept(run(new), model, IDS) <= kept(run(reference), model, IDS) + bound


# ---------------------------------------------------------------------------------------------
# Other higher-order ops


class Around(nn.Module):
    """A block, something higher-order, a block."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.second = Block(), Block()
        self.inner, self.norm, self.head = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, 4)
        self.middle = middle

    def forward(self, x):
        return self.head(self.norm(self.second(self.middle(self, self.first(x)))))


def branch(model, x):
    return torch.cond(x.sum() > 0, lambda x: model.inner(x) * 2, lambda x: x - 1, (x,))


def loop(model, x):
    def body(i, x):
        return i + 1, x * 1.5

    from torch._higher_order_ops import while_loop

    return while_loop(lambda i, x: i < 3, body, (torch.zeros((), dtype=torch.int64), x))[1]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def custom_function(model, x):
    return x + 0.1 * Square.apply(x)


@torch.compiler.nested_compile_region
def region(block, x):
    return block(x)


def nested_region(model, x):
    return region(model.second, region(model.first, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("middle", [branch, custom_function, nested_region])
def test_opaque_ops_leave_the_rest_rewritten(aot, middle, dtype):
    torch.manual_seed(0)
    model = Around(middle).to(dtype).train()
    x = torch.randn(2, 5, D, dtype=dtype)
    tolerance = {} if dtype is torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
    fast = torch.compile(model, backend="normfuse", options={**ALWAYS, "verify": True})
    for a, b in zip(step(fast, model, x), step(model, model, x), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    report = backend.reports()[0]
    assert report.max_relative_error <= 1e-10
    assert {"second.norm1", "norm"} <= {k for k, _ in report.applied}
    if middle is branch:
        [note] = report.notes
        assert "cond at" in note and "test_subgraphs.py:" in note and "1 norms inside" in note
        [(_, _, reason)] = [r for r in report.refused if r[1] == "canonicalize"]
        assert "inside the body of cond" in reason


def test_while_loop_in_inference(aot):
    model = Around(loop).double().eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    fast = torch.compile(model, backend="normfuse", options=ALWAYS)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert "while_loop" in backend.reports()[0].notes[0] and backend.reports()[0].applied


def test_bodies_laid_out_twice_keep_their_own_names(aot):
    def twice(model, x):
        return region(model.second, region(model.first, x))

    model = Around(twice).double().eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    with torch.no_grad():
        torch.compile(model, backend="normfuse", options=ALWAYS)(x)
    keys = {s.key.split("#")[0] for s in backend.reports()[0].sites if s.kind == "layer_norm"}
    assert {"first.norm1", "second.norm1", "second.norm2"} <= keys


def test_rewrite_around_cond():
    model = Around(branch).double().eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    new, report = normfuse.rewrite(model, (x,), policy="always")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="running the original code")
        for sign in (1, -1):  # both branches, their gradients too
            agree(step(new, new, sign * x), step(model, model, sign * x))
    assert "cond" in report.notes[0] and report.max_relative_error <= 1e-10
    assert {"first.norm1", "second.norm1"} <= {k for k, _ in report.applied}


def test_opaque_op_that_writes_its_operand_is_left_alone():
    from normfuse.passes.opaque import may_write

    def body(x):
        return x.mul_(2)

    outer = nn.Module()
    outer.body = torch.fx.symbolic_trace(body)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_function(torch.ops.higher_order.invoke_subgraph, (graph.get_attr("body"), x))
    graph.output(call)
    assert may_write(outer, call)
    outer.body = torch.fx.symbolic_trace(lambda x: x * 2)
    assert not may_write(outer, call)


@pytest.mark.parametrize("middle", [branch, custom_function])
def test_opaque_ops_stay_under_their_autocast(aot, middle):
    torch.manual_seed(0)
    model = Around(middle).train()
    x = torch.randn(2, 5, D)
    fast = torch.compile(model, backend="normfuse", options={**ALWAYS, "verify": True})
    with torch.autocast("cpu", torch.bfloat16):
        want = step(model, model, x)
        got = step(fast, model, x)
    assert got[0].dtype == want[0].dtype
    with torch.autocast("cpu", torch.bfloat16):
        exact = step(model.double(), model, x.double())
    for a, b, c in zip(got, want, exact, strict=True):
        bound = 3 * (b - c).abs().max() + 1e-2 * c.abs().max()
        assert (a - c).abs().max() <= bound
    report = backend.reports()[0]
    assert {"first.norm1", "second.norm1", "norm"} <= {k for k, _ in report.applied}
    assert report.max_relative_error <= 1e-10


def test_rewrite_keeps_opaque_ops_under_their_autocast():
    def product(model, x):
        return torch.cond(x.sum() > 0, lambda x: (x @ x.mT @ x).float(), lambda x: x.float(), (x,))

    model = Around(product).eval()
    x = torch.randn(2, 5, D)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for weights in ("live", "baked"):
            new, report = normfuse.rewrite(model, (x,), policy="always", weights=weights)
            assert report.applied and report.max_relative_error <= 1e-10
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="running the original code")
                for sign in (1, -1):
                    got, want = new(sign * x), model(sign * x)
                    assert got.dtype == want.dtype == torch.bfloat16
                    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def batched(model, x):
    return torch.vmap(lambda row: model.inner(row) * 2)(x)


def differentiated(model, x):
    def energy(row):
        return (row**4).sum() / 100

    return x + torch.vmap(torch.func.grad(energy))(x)


def pushed_forward(model, x):
    return torch.func.jvp(torch.tanh, (x,), (x * x,))[1]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("middle", [batched, differentiated, pushed_forward])
def test_transforms_of_functions_stay_whole(aot, middle, mode):
    torch.manual_seed(0)
    model = Around(middle).double().train(mode == "train")
    x = torch.randn(2, 5, D, dtype=torch.float64)
    fast = torch.compile(model, backend="normfuse", options={**ALWAYS, "verify": True})
    if mode == "train":
        agree(step(fast, model, x), step(model, model, x))
    else:
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
    [report] = backend.reports()
    assert report.max_relative_error <= 1e-10
    assert {"first.norm1", "second.norm1", "norm"} <= {k for k, _ in report.applied}
    [note] = report.notes
    assert "torch.func (" in note and "test_subgraphs.py:" in note
    assert ("1 norms inside" in note) == (middle is batched)


def test_transforms_in_checkpoints_and_under_autocast(aot):
    def middle(model, x):
        return checkpoint(batched, model, x, use_reentrant=False)

    torch.manual_seed(0)
    model = Around(middle).train()
    x = torch.randn(2, 5, D)
    fast = torch.compile(model, backend="normfuse", options=ALWAYS)
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            got, want = step(fast, model, x), step(model, model, x)
        assert got[0].dtype == want[0].dtype
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * b.abs().max().item())
    assert all(r.applied for r in backend.reports())
