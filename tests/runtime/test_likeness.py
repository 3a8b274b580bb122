"""What others see of a rewritten module: signatures, hints, docstrings, containers, attributes."""

from __future__ import annotations

import copy
import inspect
import pickle
import typing

import normfuse
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Documented(nn.Module):
    """A model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)
        self.scale = 1.0
        self.own = nn.Parameter(torch.ones(8))

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None, *, negate: bool = False
    ) -> torch.Tensor:
        """What it does."""
        y = self.fc(self.norm(x)) * self.scale * self.own
        y = y if mask is None else y * mask
        return -y if negate else y


class Starred(Documented):
    def forward(self, /, *xs: torch.Tensor, **options: typing.Any) -> torch.Tensor:
        return super().forward(*xs, **options)


def rewritten(model, weights="live"):
    return normfuse.rewrite(model.eval(), (torch.randn(2, 8),), weights=weights, policy="always")[0]


@pytest.mark.parametrize("weights", ["live", "baked"])
@pytest.mark.parametrize("kind", [Documented, Starred])
def test_forward_reads_like_the_models(kind, weights):
    model = kind()
    new = rewritten(model, weights)
    for module in (new, pickle.loads(pickle.dumps(new)), copy.deepcopy(new)):
        assert inspect.signature(module.forward) == inspect.signature(model.forward)
        assert inspect.signature(type(module).forward) == inspect.signature(kind.forward)
        assert inspect.getfullargspec(module.forward) == inspect.getfullargspec(model.forward)
        assert typing.get_type_hints(module.forward) == typing.get_type_hints(model.forward)
        assert inspect.signature(module) == inspect.signature(model)
        assert module.forward.__doc__ == model.forward.__doc__
        assert module.__doc__ == model.__doc__
        assert isinstance(module, nn.Module) and kind.__name__ in repr(module)
    x = torch.randn(2, 8)
    torch.testing.assert_close(pickle.loads(pickle.dumps(new))(x), model(x))


def test_a_forward_of_the_instance_alone():
    model = Documented().eval()
    plain = model.forward
    model.forward = lambda x, twice=True: plain(x) * (2 if twice else 1)
    new = normfuse.rewrite(model, (torch.randn(2, 8),), inplace=True)[0]
    assert str(inspect.signature(new.forward)) == "(x, twice=True)"
    x = torch.randn(3, 8)
    torch.testing.assert_close(new(x), model(x))


def test_a_decorated_forward_is_still_traced():
    class Decorated(Documented):
        forward = torch.compiler.disable(Documented.forward)

    model = Decorated().eval()
    new = rewritten(model)
    assert inspect.signature(new.forward) == inspect.signature(model.forward)
    x = torch.randn(2, 8)
    fast = torch.compile(new, backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("weights", ["live", "baked"])
def test_any_number_of_models_compiles_in_one_process(weights):
    """Dynamo gives up on a code object after some recompilations, so every model has one of its own."""
    x = torch.randn(2, 8)
    model = Documented()
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        new = pickle.loads(pickle.dumps(rewritten(model, weights)))
        new(x)
        fast = torch.compile(new, backend="eager", fullgraph=True)  # raises where Dynamo gave up
        torch.testing.assert_close(fast(x), model(x))


def test_exported_inputs_have_the_models_names():
    new = rewritten(Documented())
    program = torch.export.export(new, (torch.randn(2, 8),), {"negate": True})
    assert program.graph_signature.user_inputs[0] == "x"


def test_baked_pickles_do_not_need_the_models_class():
    class Local(Documented):
        pass

    model = Local()
    again = pickle.loads(pickle.dumps(rewritten(model, "baked")))
    x = torch.randn(2, 8)
    torch.testing.assert_close(again(x), model(x))


def test_containers_stay_containers():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()).eval()
    new = rewritten(model)
    assert len(new) == 3 and isinstance(new[1], nn.Linear)
    assert [type(m) for m in new] == [type(m) for m in model]
    assert not hasattr(type(rewritten(Documented())), "__len__")


@pytest.mark.parametrize("traced", [False, True])
def test_attributes_that_are_set_are_the_models(traced):
    model = Documented()
    new = rewritten(model)
    f = torch.compile(new, backend="eager") if traced else new
    x = torch.randn(2, 8)
    torch.testing.assert_close(f(x), model(x))
    for scale in (3.0, 0.5):
        new.scale = model.scale = scale
        torch.testing.assert_close(f(x), model(x))
    assert copy.deepcopy(new).scale == pickle.loads(pickle.dumps(new)).scale == 0.5
    del new.scale
    assert not hasattr(new, "scale")


def test_weights_below_may_be_parametrized_and_the_class_swapped():
    class Half(nn.Module):
        def forward(self, w):
            return w / 2

    model = Documented()
    new = rewritten(model)
    new.__class__ = type(f"Sharded{type(new).__name__}", (type(new),), {})  # as fully_shard does
    x = torch.randn(2, 8)
    for m in (model, new):
        parametrize.register_parametrization(m.fc, "weight", Half())
    torch.testing.assert_close(new(x), model(x))
    for m in (model, new):
        parametrize.remove_parametrizations(m.fc, "weight")
    torch.testing.assert_close(new(x), model(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(new))(x), model(x))


def test_trainers_find_labels_and_columns():
    transformers = pytest.importorskip("transformers")
    from transformers.utils.generic import find_labels

    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    new, _ = normfuse.rewrite(model, (torch.randint(64, (1, 4)),))
    assert find_labels(type(new)) == find_labels(type(model)) == ["labels"]
    assert list(inspect.signature(new.forward).parameters) == list(
        inspect.signature(model.forward).parameters
    )
    assert new.config is not None and new.can_generate() and new.main_input_name == "input_ids"


def test_layers_of_a_rewritten_container_can_be_replaced():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    new, _ = normfuse.rewrite(model, (x,))
    with torch.no_grad():
        new[1] = nn.Linear(8, 4)
        torch.testing.assert_close(new(x), new[1](new[0](x)))
        del new[1]
        torch.testing.assert_close(new(x), new[0](x))
