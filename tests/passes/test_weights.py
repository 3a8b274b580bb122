"""Weight programs: split, cache, notice every change that leaves a trace."""

import threading

import normfuse
import pytest
import torch
from normfuse import passes
from normfuse.passes import ir
from normfuse.passes.weights import WeightCache, lift, program_nodes, split
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
    results, errors = [], []

    def work():
        try:
            for _ in range(50):
                results.append(call())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and all(torch.equal(r, truth()) for r in results)
