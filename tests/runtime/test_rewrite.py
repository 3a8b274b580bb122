"""``normfuse.rewrite``: a module like the original, rewritten, trainable, storable, exportable."""

import copy
import pickle
import warnings

import normfuse
import pytest
import torch
from models import Mixed, Transformer, ids, logits, trained_like
from normfuse import CaptureError, NormfuseError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

WEIGHTS = ["live", "baked"]


@pytest.fixture
def model():
    return trained_like(Transformer()).eval()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_same_function_and_a_report(weights, norm):
    model = trained_like(Transformer(norm=norm)).eval()
    before = copy.deepcopy(model.state_dict())
    new, report = normfuse.rewrite(model, (ids(),), weights=weights, policy="always")
    assert report.max_relative_error <= 1e-10
    assert report.working_error["rewritten"] <= 3 * report.working_error["eager"] + 1e-7
    assert ("blocks.0.norm1", "fold_affine") in report.applied
    if norm is nn.LayerNorm:
        assert ("blocks.0.norm1", "remove_mean") in report.applied
    for shape in ((2, 6), (3, 9)):
        torch.testing.assert_close(logits(new, ids(*shape)), logits(model, ids(*shape)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_state_dict_is_the_originals(model):
    new, _ = normfuse.rewrite(model, (ids(),))
    assert list(new.state_dict()) == list(model.state_dict())
    assert dict(new.named_modules()).keys() >= dict(model.named_modules()).keys()
    other = trained_like(Transformer(), seed=5).eval()
    new.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(new, ids()), logits(other, ids()))


def test_weights_are_copied_unless_in_place(model):
    new, _ = normfuse.rewrite(model, (ids(),))
    assert new.embed.weight is not model.embed.weight
    shared, _ = normfuse.rewrite(model, (ids(),), inplace=True)
    assert shared.embed.weight is model.embed.weight


def test_trains_like_the_original():
    model = trained_like(Transformer(tied=True)).train()
    new, _ = normfuse.rewrite(model, (ids(), ids(seed=2)), policy="always")
    pairs = list(zip(new.named_parameters(), model.named_parameters(), strict=True))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (new, model)]
    for step in range(3):
        for m, optimizer in zip((new, model), optimizers, strict=True):
            optimizer.zero_grad()
            m(ids(seed=step), ids(seed=step + 1))["loss"].backward()
        for (name, a), (_, b) in pairs:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
        for optimizer in optimizers:
            optimizer.step()
    new.eval(), model.eval()
    torch.testing.assert_close(logits(new, ids()), logits(model, ids()), rtol=1e-3, atol=1e-4)


def test_one_graph_per_mode_and_dropout_only_in_training():
    model = trained_like(Transformer(dropout=0.5))
    new, _ = normfuse.rewrite(model.eval(), (ids(),))
    torch.testing.assert_close(logits(new, ids()), logits(new, ids()))
    new.train()
    assert new.training and new.blocks[0].drop.training
    assert not torch.equal(logits(new, ids()), logits(new, ids()))
    assert len(new.reports) == 2
    new.eval()
    torch.testing.assert_close(logits(new, ids()), logits(model, ids()))
    assert len(new.reports) == 2


def test_dropout_draws_the_same_mask_as_eager():
    model = trained_like(Transformer(dropout=0.5)).train()
    new, _ = normfuse.rewrite(model, (ids(),), policy="always")
    outputs = []
    for m in (new, model):
        torch.manual_seed(3)
        outputs.append(logits(m, ids()))
    torch.testing.assert_close(*outputs)


def test_weight_updates_are_seen_in_inference(model):
    new, _ = normfuse.rewrite(model, (ids(),))
    logits(new, ids())
    with torch.no_grad():
        for m in (model, new):
            m.blocks[0].norm1.weight.mul_(3)  # in place
            m.blocks[1].up.weight = nn.Parameter(m.blocks[1].up.weight * 2)  # re-assigned
            m.blocks[0].q.weight += m.blocks[0].k.weight @ m.blocks[0].v.weight  # LoRA-like merge
    torch.testing.assert_close(logits(new, ids()), logits(model, ids()))
    model.double(), new.double()
    torch.testing.assert_close(logits(new, ids()), logits(model, ids()))


def test_a_merge_through_data_is_seen_after_refresh(model):
    new, _ = normfuse.rewrite(model, (ids(),), policy="always")
    stale = logits(new, ids())
    for m in (model, new):
        block = m.blocks[0]
        block.q.weight.data += block.k.weight.data @ block.v.weight.data  # as LoRA is merged
    expected = logits(model, ids())
    assert not torch.allclose(stale, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(new, ids()), stale)  # the edit left no trace
    assert normfuse.refresh() > 0
    torch.testing.assert_close(logits(new, ids()), expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_pickle_and_deepcopy(model, weights):
    new, report = normfuse.rewrite(model, (ids(),), weights=weights)
    expected = logits(new, ids())
    torch.testing.assert_close(logits(pickle.loads(pickle.dumps(new)), ids()), expected)
    torch.testing.assert_close(logits(copy.deepcopy(new), ids()), expected)
    assert pickle.loads(pickle.dumps(report)).to_dict() == report.to_dict()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_safetensors_round_trip(model, weights, tmp_path):
    new, _ = normfuse.rewrite(model, (ids(),), weights=weights)
    expected = logits(new, ids())
    save_file({k: v.contiguous() for k, v in new.state_dict().items()}, tmp_path / "m.safetensors")
    with torch.no_grad():
        for p in new.parameters():
            p.zero_()
    new.load_state_dict(load_file(tmp_path / "m.safetensors"))
    torch.testing.assert_close(logits(new, ids()), expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_export(model, weights):
    new, _ = normfuse.rewrite(model, (ids(),), weights=weights)
    program = torch.export.export(new, (ids(),))
    torch.testing.assert_close(program.module()(ids())["logits"], model(ids())["logits"])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_compile_what_was_rewritten(model, weights):
    new, _ = normfuse.rewrite(model, (ids(),), weights=weights)
    compiled = torch.compile(new, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, ids()), logits(model, ids()))


def test_keyword_arguments_and_new_structures(model):
    new, _ = normfuse.rewrite(model, (), {"ids": ids(), "labels": ids(seed=2)})
    with torch.no_grad():
        a, b = (m(ids=ids(), labels=ids(seed=2)) for m in (new, model))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(logits(new, ids()), logits(model, ids()))  # another structure
    assert len(new.reports) == 2


def test_autocast_outside(model):
    new, _ = normfuse.rewrite(model, (ids(),))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = logits(new, ids()), logits(model, ids())
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(logits(new, ids()), logits(model, ids()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(dtype):
    model = trained_like(Transformer(d=32)).eval().to(dtype)
    _, report = normfuse.rewrite(model, (ids(),), policy="always")
    assert report.applied and report.max_relative_error <= 1e-10
    assert report.working_error["rewritten"] <= 1.5 * report.working_error["eager"]


def test_baked_weights_are_plain_parameters(model):
    baked, _ = normfuse.rewrite(model, (ids(),), passes="rotation_ready", weights="baked")
    names = set(baked.state_dict())
    assert "blocks.0.q.weight" in names and "blocks.0.norm1.weight" not in names
    assert not torch.equal(baked.get_parameter("blocks.0.q.weight"), model.blocks[0].q.weight)
    with pytest.raises(NormfuseError, match="captured for inputs"):
        baked(ids(), ids())
    with pytest.raises(NormfuseError, match="does not stand for"):
        baked(ids().float())


def test_added_parameters_belong_to_the_module(model):
    new, report = normfuse.rewrite(model, (ids(),), passes=["insert_gated_norm"])
    assert report.applied
    added = set(new.state_dict()) - set(model.state_dict())
    assert added and added == set(new.new_parameters)
    assert torch.equal(logits(new, ids()), logits(model, ids()))
    with torch.no_grad():
        for name in added:
            new.get_parameter(name).normal_()
    changed = logits(new, ids())
    assert not torch.equal(changed, logits(model, ids()))
    new.train()
    new(ids(), ids(seed=2))["loss"].backward()  # another mode and another structure
    assert all(new.get_parameter(name).grad is not None for name in added)
    assert set(new.state_dict()) - set(model.state_dict()) == added
    new.eval()
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        torch.testing.assert_close(logits(twin, ids()), changed)


def test_code_that_cannot_be_captured_again_runs_as_it_is():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x, flag=None):
            if flag is not None and x.sum() > 0:
                return self.fc(x)
            return self.fc(self.norm(x))

    model = Picky().eval()
    x = torch.ones(2, 4)
    new, _ = normfuse.rewrite(model, (x,))
    with pytest.warns(UserWarning, match="running the original") as said:
        assert torch.equal(new(x, True), model(x, True))
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(new(x, True), model(x, True))


def test_model_without_norms():
    model = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    new, report = normfuse.rewrite(model, (x,), disable="merge_linears")
    assert torch.equal(new(x), model(x)) and not report.applied


def test_nan_and_inf_propagate_as_in_eager(model):
    class Head(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.norm, self.fc = inner.norm, inner.blocks[0].up

        def forward(self, x):
            return self.fc(self.norm(x))

    head = Head(model).eval()
    x = torch.randn(4, 16)
    x[1, 2], x[2, 5] = float("nan"), float("inf")
    new, _ = normfuse.rewrite(head, (torch.randn(4, 16),), policy="always")
    with torch.no_grad():
        a, b = new(x), head(x)
    torch.testing.assert_close(a, b, equal_nan=True)


class Gated(nn.Module):
    """A pre-norm block whose nonlinearity turns Inf into a finite number."""

    def __init__(self, norm):
        super().__init__()
        self.place = nn.Parameter(torch.randn(5, 8))
        self.norm, self.a, self.b = norm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale, self.out = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)
        self.final, self.head = norm(8), nn.Linear(8, 6)

    def forward(self, x):
        x = x + self.place
        h = self.norm(x)
        x = x + self.scale * self.out(torch.tanh(self.a(h)) * self.b(h))
        return self.head(self.final(x))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_weights_that_are_not_finite_are_left_alone(norm, value):
    start = trained_like(Gated(norm)).eval()
    x = torch.randn(2, 5, 8)
    for name, _ in start.named_parameters():
        model = copy.deepcopy(start)
        with torch.no_grad():
            weight = model.get_parameter(name).view(-1)
            weight[weight.numel() // 2] = value
            new, report = normfuse.rewrite(model, (x,), policy="always")
            got, want = new(x), model(x)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        assert any("not finite" in n and name in n for n in report.notes)
        assert not report.failed_verification
        if name in ("a.weight", "head.weight"):
            reasons = [r for _, p, r in report.refused if p == "fold_affine"]
            assert any(f"{name} holds Inf or NaN" in r for r in reasons)


def test_bad_arguments(model):
    with pytest.raises(NormfuseError, match=r"nn\.Module"):
        normfuse.rewrite(lambda x: x, (ids(),))
    with pytest.raises(CaptureError, match="tuple"):
        normfuse.rewrite(model, ids())
    with pytest.raises(NormfuseError, match="no preset or pass"):
        normfuse.rewrite(model, (ids(),), passes="everything")
    with pytest.raises(NormfuseError, match="policy"):
        normfuse.rewrite(model, (ids(),), policy="sometimes")
    with pytest.raises(NormfuseError, match="weights"):
        normfuse.rewrite(model, (ids(),), weights="frozen")


def test_explain_changes_nothing_and_draws_the_stream(model):
    before = copy.deepcopy(model.state_dict())
    report = normfuse.explain(model, (ids(),), policy="always")
    assert {s.key for s in report.sites} >= {"blocks.0.norm1", "blocks.1.norm2", "norm"}
    assert report.applied and report.streams and "svg" in report.streams[0]["svg"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bisect_names_the_guilty_site(model, monkeypatch):
    from normfuse.passes.exact import FoldAffine

    real = FoldAffine.attempt

    def sabotaged(self, context, result, key, plan):
        def bad_plan():
            commit = plan()

            def bad_commit():
                commit()
                if key == "blocks.1.norm2":
                    for node in gms[-1].graph.nodes:
                        if node.meta.get("weight_program"):
                            last = node
                    with last.graph.inserting_after(last):
                        double = last.graph.call_function(torch.ops.aten.mul.Tensor, (last, 2.0))
                    double.meta = dict(last.meta)
                    last.replace_all_uses_with(double, delete_user_cb=lambda u: u is not double)

            return bad_commit

        return real(self, context, result, key, bad_plan)

    gms = []
    run = FoldAffine.run

    def remember(self, gm, context):
        gms.append(gm)
        return run(self, gm, context)

    monkeypatch.setattr(FoldAffine, "run", remember)
    monkeypatch.setattr(FoldAffine, "attempt", sabotaged)
    culprit = normfuse.bisect(model, (ids(),), passes=["fold_affine"])
    assert (culprit.pass_name, culprit.site) == ("fold_affine", "blocks.1.norm2")
    monkeypatch.undo()
    assert normfuse.bisect(model, (ids(),), passes=["fold_affine"]) is None


def test_steps_of_fused_optimizers_are_seen(model):
    new, _ = normfuse.rewrite(model, (ids(),), policy="always")
    logits(new, ids())
    for m in (model, new):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, fused=True)
        m(ids())["logits"].square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(logits(new, ids()), logits(model, ids()))


def test_function_transforms_without_gradients():
    from torch.func import functional_call, jvp, vmap

    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    model = trained_like(model).double().eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    new, _ = normfuse.rewrite(model, (x,), policy="always")
    weights = {n: p.detach() for n, p in model.named_parameters()}
    stacked = {n: torch.stack([p, 2 * p]) for n, p in weights.items()}

    def of(m):
        def f(p):
            return functional_call(m, p, (x,))

        return vmap(f)(stacked), *jvp(f, (weights,), (weights,)), m(x)

    with torch.no_grad():
        new(x)
        for a, b in zip(of(new), of(model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with pytest.warns(UserWarning, match="inside vmap, grad, jvp"):
        out = vmap(new)(x)  # rows without a batch: no graph, and none can be made here
    torch.testing.assert_close(out, model(x))


def test_baked_weights_stay_frozen(model):
    for name, p in model.named_parameters():
        p.requires_grad_("blocks.0" in name)
    new, _ = normfuse.rewrite(model, (ids(),), passes="rotation_ready", weights="baked")
    trainable = {n for n, p in new.named_parameters() if p.requires_grad}
    assert trainable and all("blocks.0" in n for n in trainable)


def test_threads_capture_one_at_a_time(model):
    from concurrent.futures import ThreadPoolExecutor

    from normfuse.passes import capture

    shapes = [(1, 3), (2, 5), (3, 4), (1, 1)]
    with ThreadPoolExecutor(4) as pool:
        graphs = list(pool.map(lambda s: capture(model, (ids(*s),), dynamic=False), shapes))
    for gm, shape in zip(graphs, shapes, strict=True):
        torch.testing.assert_close(logits(gm, ids(*shape)), logits(model, ids(*shape)))


def test_models_that_cannot_be_copied_say_what_to_do():
    model = Mixed().eval()
    prune.l1_unstructured(model.b, "weight", 0.5)
    x = torch.randn(4, 8)
    with pytest.raises(NormfuseError, match="inplace=True"):
        normfuse.rewrite(model, (x,))


@pytest.mark.parametrize("traced", [False, True])
def test_constants_among_the_inputs_are_part_of_the_signature(traced):
    class Scaled(Mixed):
        def forward(self, x, by=None):
            scale = 1 if by is None else 5 if isinstance(by, str) else by
            return super().forward(x) * scale

    model = trained_like(Scaled()).double().eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    new, _ = normfuse.rewrite(model, (x, None), policy="always")
    f = torch.compile(new, backend="eager") if traced else new
    for by in (None, 3, "a", 2.5, True, None, torch.tensor(2.0, dtype=torch.float64)):
        torch.testing.assert_close(f(x, by), model(x, by), rtol=1e-10, atol=1e-12)


class Sampler(Transformer):
    """A model with a method that calls it, as ``generate`` does."""

    def greedy(self, start, steps):
        with torch.no_grad():
            for _ in range(steps):
                following = self(ids=start)["logits"][:, -1:].argmax(-1)
                start = torch.cat((start, following), 1)
        return start

    def first_block(self):
        return self.blocks[0]


def count_runs(monkeypatch):
    from normfuse.runtime.rewrite import Graph

    runs, run = [], Graph.run
    monkeypatch.setattr(Graph, "run", lambda *a, **k: runs.append(1) or run(*a, **k))
    return runs


def test_methods_that_call_the_model_meet_the_rewritten_forward(monkeypatch):
    model = trained_like(Sampler()).eval()
    new, _ = normfuse.rewrite(model, (), {"ids": ids()}, policy="always")
    runs = count_runs(monkeypatch)
    assert torch.equal(new.greedy(ids(), 4), model.greedy(ids(), 4))
    assert len(runs) == 4
    assert new.first_block() is new.blocks[0]
    assert "forward" not in new._source.__dict__
    with pytest.raises(TypeError):
        new.greedy("no tensor", 1)
    assert "forward" not in new._source.__dict__
    copied = copy.deepcopy(new)
    assert torch.equal(copied.greedy(ids(), 2), model.greedy(ids(), 2))


def test_methods_survive_a_capture_and_a_refusal_on_the_way(monkeypatch):
    model = trained_like(Sampler()).eval()
    new, _ = normfuse.rewrite(model, (), {"ids": ids()}, dynamic=False)
    assert torch.equal(new.greedy(ids(1, 3), 3), model.greedy(ids(1, 3), 3))  # captured inside
    assert len(new.reports) == 4
    monkeypatch.setattr("normfuse.runtime.rewrite.MAX_GRAPHS", 0)
    with pytest.warns(UserWarning, match="original code"):
        assert torch.equal(new.greedy(ids(3, 3), 2), model.greedy(ids(3, 3), 2))


def test_generate_of_transformers_runs_the_rewritten_graph(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = trained_like(transformers.GPT2LMHeadModel(config)).eval()
    prompt = torch.randint(64, (1, 4))
    new, _ = normfuse.rewrite(model, (prompt,), policy="always")
    runs = count_runs(monkeypatch)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(new.generate(prompt, **options), model.generate(prompt, **options))
    assert len(runs) == 4
