"""The pass contract: transactions, rollback, fuel, switches, verification that finds the site."""

import gc
import pickle

import pytest
import torch
from normfuse import passes
from normfuse.passes import Context, NormfuseError, Pass, PassManager, PassResult, Refuse, ir
from torch import fx, nn

aten = torch.ops.aten


class Chain(nn.Module):
    def __init__(self, n=4, d=8):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(n))
        self.linears = nn.ModuleList(nn.Linear(d, d) for _ in range(n))

    def forward(self, x):
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return x


X = torch.randn(3, 8)


def captured(n=4):
    gm = passes.capture(Chain(n).eval(), (X,))
    gm.meta["example_inputs"] = [X]
    return gm


def set_eps(node, eps):
    args = ir.NormArgs(node)
    with node.graph.inserting_before(node):
        new = ir.emit(
            node.graph,
            node.target,
            args.x,
            args.dims,
            args.gain,
            args.bias,
            eps,
            like=node,
            stat_dtype=args.stat_dtype,
            norm_dtype=args.norm_dtype,
            out_dtype=args.out_dtype,
        )
    ir.inherit(new, node, site=True)
    ir.replace(node, new)


class Touch(Pass):
    """Re-emits every norm; ``wrong`` names a site to get wrong, ``crash`` one to fail at."""

    name = "touch"

    def run(self, gm, context):
        result = PassResult()
        for node in ir.norm_nodes(gm):
            key = node.meta["site"]

            def plan(node=node, key=key):
                if key == self.options.get("refuse"):
                    raise Refuse("told to refuse", node)

                def commit():
                    set_eps(node, 0.5 if key == self.options.get("wrong") else 1e-5)
                    if key == self.options.get("crash"):
                        raise ValueError("half way")

                return commit

            self.attempt(context, result, key, plan)
        return result


KEYS = [f"norms.{i}" for i in range(4)]


def test_applied_refused_and_records():
    gm, report = PassManager([Touch(refuse="norms.2")]).run(captured())
    assert [k for k, _ in report.applied] == ["norms.0", "norms.1", "norms.3"]
    [(key, name, reason)] = report.refused
    assert (key, name) == ("norms.2", "touch")
    assert "told to refuse" in reason and "norms.2" in reason and "test_manager.py:" in reason
    assert report.passes[0].applied == 3 and report.passes[0].refused == 1
    torch.testing.assert_close(gm(X), Chain.forward(gm_model(gm), X))


def gm_model(gm):
    model = Chain()
    model.load_state_dict(gm.state_dict())
    return model


def test_failed_commit_is_rolled_back_and_the_rest_still_applies():
    gm = captured()
    expected = gm(X)
    gm, report = PassManager([Touch(crash="norms.1")]).run(gm)
    assert [k for k, _ in report.applied] == ["norms.0", "norms.2", "norms.3"]
    assert any("half way" in n for n in report.notes)
    assert any("rolled back" in r for _, _, r in report.refused)
    torch.testing.assert_close(gm(X), expected)
    ir.check(gm)


@pytest.mark.parametrize("wrong", KEYS)
def test_verification_finds_undoes_and_names_the_site(wrong):
    gm = captured()
    expected = gm(X)
    gm, report = PassManager([Touch(wrong=wrong)], verify=True).run(gm)
    assert report.failed_verification
    assert any(wrong in n and "float64" in n for n in report.notes)
    assert [k for k, _ in report.applied] == [k for k in KEYS if k != wrong]
    torch.testing.assert_close(gm(X), expected)


class Encoder(nn.Module):
    """One stream with two norms, which remove_mean changes together."""

    def __init__(self, d=8):
        super().__init__()
        self.e, self.f, self.h = (nn.Linear(d, d) for _ in range(3))
        self.n1, self.n2 = (nn.LayerNorm(d, elementwise_affine=False) for _ in range(2))

    def forward(self, x):
        x = self.e(x)
        x = x + self.f(torch.tanh(self.n1(x)))
        return torch.tanh(self.h(self.n2(x)))


def test_verification_blames_the_stream_that_is_wrong_and_keeps_the_other(monkeypatch):
    from normfuse.passes.exact import RemoveMean

    gm = passes.capture(nn.Sequential(Encoder(), Encoder()).eval(), (X,))
    gm.meta["example_inputs"] = [X]
    expected = gm(X)
    real = RemoveMean.attempt

    def sabotaged(self, context, result, key, plan):
        def bad_plan():
            commit = plan()

            def bad_commit():
                commit()
                if key.startswith("1."):
                    last = [n for n in gm.graph.nodes if n.target is aten.tanh.default][-1]
                    last.update_arg(0, last.args[0].args[0])  # reads past the head

            return bad_commit

        return real(self, context, result, key, bad_plan)

    monkeypatch.setattr(RemoveMean, "attempt", sabotaged)
    gm, report = PassManager(["remove_mean"], verify=True).run(gm)
    assert [k for k, _ in report.applied] == ["0.n1", "0.n2"]
    assert any("remove_mean at 1.n1" in n for n in report.notes)
    torch.testing.assert_close(gm(X), expected)


def test_a_wrong_pass_that_keeps_no_journal_is_undone_whole():
    class Negates(Pass):
        name = "negates"

        def run(self, gm, context):
            node = next(n for n in gm.graph.nodes if ir.is_call(n, aten.tanh))
            node.target = aten.neg.default
            return PassResult(applied=["somewhere"])

    gm = passes.capture(Encoder().eval(), (X,))
    gm.meta["example_inputs"] = [X]
    expected = gm(X)
    gm, report = PassManager([Negates()], verify=True).run(gm)
    assert report.failed_verification and not report.applied
    torch.testing.assert_close(gm(X), expected)


def test_nothing_keeps_a_captured_model_alive():
    def alive():
        gc.collect()
        return sum(isinstance(o, (fx.Graph, fx.Node, nn.Parameter)) for o in gc.get_objects())

    def once():
        model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval()
        PassManager(["fold_affine"]).run(passes.capture(model, (X,)))

    once()
    before = alive()
    for _ in range(3):
        once()
    assert alive() <= before


def test_fuel_and_journal_count_alike():
    gm = passes.capture(nn.Sequential(Encoder(), Encoder()).eval(), (X,))
    context = Context(fuel=10)
    PassManager(["remove_mean"], context).run(gm)
    assert 10 - context.fuel == len(context.journal) == 2


def test_fuel_limits_the_number_of_rewrites():
    for fuel in range(5):
        context = Context(fuel=fuel)
        _, report = PassManager([Touch()], context).run(captured())
        assert [k for k, _ in report.applied] == KEYS[:fuel]
        assert context.journal == [("touch", k) for k in KEYS[:fuel]]


def test_fuel_and_disable_by_environment(monkeypatch):
    monkeypatch.setenv("NORMFUSE_FUEL", "1")
    _, report = PassManager([Touch()]).run(captured())
    assert len(report.applied) == 1
    monkeypatch.setenv("NORMFUSE_DISABLE", "no_such_pass")
    with pytest.raises(NormfuseError, match="no_such_pass"):
        PassManager([Touch()]).run(captured())


def test_disabled_pass_does_not_run():
    _, report = PassManager(["fold_affine"], Context(disabled=frozenset({"fold_affine"}))).run(
        captured()
    )
    assert report.passes[0].disabled and not report.applied


def test_uuid_is_stable_and_covers_passes_order_and_options():
    def uuid(*ps):
        return PassManager(ps).uuid()

    a, b = Touch(), Touch(wrong="x")
    assert uuid(a) == uuid(Touch())
    assert len({uuid(a), uuid(b), uuid(a, a), uuid(a, b), uuid(b, a)}) == 5
    assert pickle.loads(pickle.dumps(a)).uuid() == a.uuid()


def test_illegal_graph_is_an_error_and_leaves_the_old_graph():
    class Breaks(Pass):
        name = "breaks"

        def run(self, gm, context):
            node = ir.norm_nodes(gm)[0]
            node.update_arg(1, [0])
            return PassResult(applied=["norms.0"])

    gm = captured()
    expected = gm(X)
    with pytest.raises(passes.SpecError):
        PassManager([Breaks()]).run(gm)
    ir.check(gm)
    torch.testing.assert_close(gm(X), expected)


def test_unknown_passes_are_named():
    with pytest.raises(NormfuseError, match="no_such"):
        PassManager(["no_such"])
    with pytest.raises(NormfuseError, match="expected a pass"):
        PassManager([3])


def test_registry_lists_promises():
    known = passes.registry()
    assert known["fold_affine"].promise == "exact"
    assert {p.promise for p in known.values()} <= {"exact", "extend", "alter"}
    assert passes.FoldAffine is known["fold_affine"]
