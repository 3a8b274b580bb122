"""Weight programs: split, cache, notice every change that leaves a trace."""

import copy
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import normfuse
import pytest
import torch
from normfuse import passes
from normfuse.passes import ir
from normfuse.passes.weights import WeightCache, WeightProgram, lift, program_nodes, split
from torch import nn

aten = torch.ops.aten


def scaled_program():
    """A linear whose weight is multiplied by a gain inside the graph, marked as weight program."""
    model = nn.Sequential(nn.LayerNorm(4, bias=False), nn.Linear(4, 3)).eval()
    gm = passes.capture(model, (torch.randn(2, 4),))
    linear = next(n for n in gm.graph.nodes if ir.is_call(n, aten.linear.default))
    gain = ir.NormArgs(ir.norm_nodes(gm)[0]).gain
    with gm.graph.inserting_before(linear):
        folded = ir.emit(gm.graph, aten.mul.Tensor, linear.args[1], gain, like=linear, weight=True)
    linear.update_arg(1, folded)
    lifted, names = lift(gm)
    program = split(lifted)
    lifted.recompile()
    return model, lifted, names, program


def test_split_moves_exactly_the_weight_program():
    model, lifted, names, program = scaled_program()
    assert not program_nodes(lifted)
    assert program.bytes == 3 * 4 * 4
    cache = WeightCache(program)
    leaves = [model.get_parameter(names[i]) for i in program.leaves]
    [folded] = cache(leaves)
    assert torch.equal(folded, model[1].weight * model[0].weight)
    new = lifted.graph.find_nodes(op="placeholder")[-1]
    assert new.meta["fqn"] == "1.weight"
    x = torch.randn(5, 4)
    out = lifted(*[model.get_parameter(n) for n in names], x, folded)
    torch.testing.assert_close(
        out[0] if isinstance(out, tuple) else out,
        model[1](model[0](x) * model[0].weight),
    )


@pytest.fixture
def cached():
    model, _, names, program = scaled_program()
    cache = WeightCache(program)

    def call():
        leaves = [model.get_parameter(names[i]) for i in program.leaves]
        with torch.no_grad():
            return cache(leaves)[0]

    def truth():
        return model[1].weight.detach() * model[0].weight.detach()

    return model, cache, call, truth


def test_cached_while_nothing_changes(cached):
    _, _, call, truth = cached
    first = call()
    assert torch.equal(first, truth()) and call() is first


def change_in_place(model):
    with torch.no_grad():
        model[0].weight.mul_(3)


def change_by_load(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


def change_by_assignment(model):
    model[1].weight = nn.Parameter(torch.randn(3, 4))


def change_data_pointer(model):
    model[1].weight.data = torch.randn(3, 4)


def change_dtype(model):
    model.double()


def change_by_optimizer(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.5).step()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_by_load,
        change_by_assignment,
        change_data_pointer,
        change_dtype,
        change_by_optimizer,
    ],
)
def test_changes_are_noticed(cached, change):
    model, _, call, truth = cached
    before = call().clone()
    change(model)
    after = call()
    assert after.dtype != before.dtype or not torch.equal(after, before)
    torch.testing.assert_close(after, truth())


def test_address_is_kept_across_refreshes(cached):
    model, _, call, truth = cached
    pointer = call().data_ptr()
    change_in_place(model)
    after = call()
    assert after.data_ptr() == pointer and torch.equal(after, truth())


def test_untraceable_writes_need_an_explicit_refresh(cached):
    model, cache, call, truth = cached
    stale = call().clone()
    model[0].weight.data.mul_(5)
    assert torch.equal(call(), stale)  # documented: .data leaves no trace
    assert normfuse.refresh() >= 1
    assert torch.equal(call(), truth())
    cache.refresh()
    assert torch.equal(call(), truth())


def test_inference_tensors():
    _, _, names, program = scaled_program()
    with torch.inference_mode():
        model = nn.Sequential(nn.LayerNorm(4, bias=False), nn.Linear(4, 3))
        leaves = [model.get_parameter(names[i]) for i in program.leaves]
        cache = WeightCache(program)
        [a] = cache(leaves)
        assert torch.equal(a, model[1].weight * model[0].weight)
    [b] = cache(leaves)  # and outside of it
    assert torch.equal(a, b)


def test_result_never_shares_storage_with_a_weight():
    model, _, names, program = scaled_program()
    cache = WeightCache(program)
    leaves = [model.get_parameter(names[i]) for i in program.leaves]
    pointers = {t.untyped_storage().data_ptr() for t in model.parameters()}
    assert all(t.untyped_storage().data_ptr() not in pointers for t in cache(leaves))


def test_threads_get_one_consistent_result(cached):
    _, _, call, truth = cached
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: [call() for _ in range(50)], range(4)))
    assert all(torch.equal(r, truth()) for rs in results for r in rs)


def test_models_that_share_a_graph_are_folded_once_each_and_freed(cached):
    model, cache, call, truth = cached
    others = [copy.deepcopy(model) for _ in range(3)]
    leaves = [[m[1].weight, m[0].weight] for m in others]
    if not torch.equal(cache(leaves[0])[0], truth()):
        leaves = [pair[::-1] for pair in leaves]
    with torch.no_grad():
        for i, m in enumerate(others):
            m[0].weight.mul_(i + 2)
    first = [cache(pair)[0] for pair in leaves]
    assert all(cache(pair)[0] is f for pair, f in zip(leaves, first, strict=True))
    for m, f in zip(others, first, strict=True):
        assert torch.equal(f, m[1].weight * m[0].weight)
    for p in others[1].parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(others[1].parameters(), 0.5).step()
    for m, pair in zip(others, leaves, strict=True):
        assert torch.equal(cache(pair)[0], m[1].weight * m[0].weight)
    alive = [weakref.ref(t) for f in first for t in (f,)]
    before = cache.bytes
    del others, leaves, first, m, f, pair, p
    assert not any(r() is not None for r in alive)  # without the garbage collector
    assert cache.bytes == before - 3 * cache.program.bytes and call() is not None


def test_programs_are_the_same_only_with_the_same_constants_and_sizes():
    def key(size, constant, name="w"):
        graph = torch.fx.Graph()
        weight = graph.placeholder(name)
        weight.meta["val"] = torch.empty(size)
        graph.output((graph.call_function(aten.mul.Tensor, (weight, graph.get_attr("c"))),))
        module = torch.fx.GraphModule({"c": torch.tensor(constant)}, graph)
        return WeightProgram(module, [0], 0).key

    assert key(4, 2.0) == key(4, 2.0, name="v")
    assert len({key(4, 2.0), key(4, 3.0), key(5, 2.0)}) == 3


def test_memory_of_models_that_share_a_graph_is_limited():
    model, _, names, program = scaled_program()
    cache = WeightCache(program, limit=2 * program.bytes)
    models = [copy.deepcopy(model) for _ in range(4)]
    with pytest.warns(UserWarning, match="max_folded_bytes") as said:
        for _ in range(2):
            for m in models:
                [folded] = cache([m.get_parameter(names[i]) for i in program.leaves])
                assert torch.equal(folded, m[1].weight * m[0].weight)
                assert cache.bytes <= cache.limit
    assert len(said) == 1


def test_threads_with_models_that_share_a_graph():
    model, _, names, program = scaled_program()
    cache = WeightCache(program)
    models = [copy.deepcopy(model) for _ in range(4)]
    with torch.no_grad():
        for i, m in enumerate(models):
            m[0].weight.fill_(i + 1.0)

    def work(m):
        truth = m[1].weight * m[0].weight
        leaves = [m.get_parameter(names[i]) for i in program.leaves]
        for _ in range(300):
            folded = cache(leaves)[0]
            time.sleep(0)  # the others' turn, before it is used
            assert torch.equal(folded, truth)

    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(work, models))
