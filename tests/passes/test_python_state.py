"""Python state in a forward: refused if a graph would freeze it, left as it was in any case."""

import normfuse
import pytest
import torch
from normfuse import CaptureError
from normfuse.passes.capture import capture
from torch import nn

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
CALLS: list[int] = []
SEEN: dict[str, int] = {}
COUNT = 0


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.n, self.f = nn.LayerNorm(8), nn.Linear(8, 8)

    def base(self, x):
        return self.f(self.n(x))


class InAttribute(Base):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.base(x) * self.calls


class NewAttribute(Base):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.base(x) * self.calls


class Unused(InAttribute):
    """A mere count: the graph is the same, but it would count no more."""

    def forward(self, x):
        self.calls += 1
        return self.base(x)


class InList(Base):
    def __init__(self):
        super().__init__()
        self.log = [[]]

    def forward(self, x):
        self.log[0].append(1)
        return self.base(x) * len(self.log[0])


class Stats:
    def __init__(self):
        self.calls = 0


class InObject(Base):
    def __init__(self):
        super().__init__()
        self.stats = Stats()

    def forward(self, x):
        self.stats.calls += 1
        return self.base(x) * self.stats.calls


class InClass(Base):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return self.base(x) * self.calls


class InGlobalList(Base):
    def forward(self, x):
        CALLS.append(1)
        return self.base(x) * len(CALLS)


class InGlobalNumber(Base):
    """Behind a method and a function."""

    def forward(self, x):
        return self.step(x)

    def step(self, x):
        return self.base(x) * bump()


def bump():
    global COUNT
    COUNT += 1
    return COUNT


class InDefault(Base):
    def forward(self, x, seen=[]):  # noqa: B006  (the case)
        seen.append(1)
        return self.base(x) * len(seen)


class FirstCallOnly(Base):
    """Settles, but the first call is not like the others."""

    def __init__(self):
        super().__init__()
        self.ready = False

    def forward(self, x):
        y = self.base(x)
        if not self.ready:
            self.ready = True
            return y * 2
        return y


def in_closure():
    base, calls = Base().eval(), 0

    def forward(x):
        nonlocal calls
        calls += 1
        return base.n(x) * calls

    return forward, lambda: calls


REFUSED = {
    InAttribute: "attribute calls of the model",
    NewAttribute: "attribute calls of the model",
    Unused: "attribute calls of the model",
    InList: "attribute log of the model",
    InObject: "attribute stats of the model",
    InClass: "attribute calls of class InClass",
    InGlobalList: "global CALLS of .*test_python_state",
    InGlobalNumber: "global COUNT of .*test_python_state",
    InDefault: "in the arguments of InDefault.forward",
    FirstCallOnly: "attribute ready of the model and computes something else",
}


def state(model):
    own = {k: repr(v) for k, v in vars(model).items() if isinstance(v, (int, list))}
    inside = model.stats.calls if isinstance(model, InObject) else None
    seen = tuple(InDefault.forward.__defaults__[0])
    return own, inside, InClass.calls, tuple(CALLS), COUNT, seen


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_state_is_refused_by_name_and_put_back(cls):
    model = cls().eval()
    before = state(model)
    with pytest.raises(CaptureError, match=REFUSED[cls]):
        capture(model, (X,))
    assert state(model) == before


def test_a_submodule_is_named():
    model = nn.Sequential(Base().n, InAttribute()).eval()
    with pytest.raises(CaptureError, match="attribute calls of module '1'"):
        normfuse.rewrite(model, (X,))


def test_a_closure_is_named_and_put_back():
    forward, calls = in_closure()
    with pytest.raises(CaptureError, match=r"calls in the closure of in_closure"):
        capture(forward, (X,))
    assert calls() == 0


class Memo(Base):
    """Values that depend on the inputs only and settle: no state that matters."""

    def __init__(self):
        super().__init__()
        self.longest, self.cache, self.last = 0, {}, None

    def forward(self, x):
        self.longest = x.shape[0]
        self.cache["scale"] = 2.0
        SEEN["last"] = 1
        self.last = (self.n, "done")
        return self.base(x) * self.cache["scale"]


def test_a_memo_is_captured_with_a_note_and_left_alone():
    model = Memo().eval()
    SEEN.clear()
    new, report = normfuse.rewrite(model, (X,), inplace=True)
    [note] = [n for n in report.notes if "forward sets" in n]
    assert "attribute longest of the model" in note and "does not" in note
    assert (model.longest, model.cache, model.last, SEEN) == (0, {}, None, {})
    torch.testing.assert_close(new(X[:2]), model(X[:2]))


def test_a_rewritten_module_runs_the_original_once_it_counts():
    model = InAttribute().eval()
    model.forward = model.base  # nothing is counted yet
    new, _ = normfuse.rewrite(model, (X,))
    del new._source.forward
    new._forget()
    with pytest.warns(UserWarning, match="attribute calls"), torch.no_grad():
        one = new(X)
    with torch.no_grad():
        torch.testing.assert_close(new(X), one * 2)


class LazyTensor(Base):
    """A tensor made by the first call, and the largest size seen so far."""

    scale = None
    seen = 4

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.full((1,), 2.0)
        if x.shape[0] > self.seen:
            self.seen = x.shape[0]
        return self.base(x) * self.scale


@pytest.mark.parametrize("entry", ["rewrite", "explain"])
def test_a_tensor_made_once_is_a_memo_and_none_of_the_traces_stays(entry):
    model = LazyTensor().eval()
    x = torch.randn(9, X.shape[1])
    result = getattr(normfuse, entry)(model, (x,))
    assert "scale" not in vars(model) and LazyTensor.scale is None and "seen" not in vars(model)
    assert type(model(x)) is torch.Tensor
    if entry == "rewrite":
        torch.testing.assert_close(result[0](x), model(x))


class WithNan(Memo):
    def forward(self, x):
        return super().forward(x) + torch.tensor([0.0, float("nan")]).nan_to_num()[0]


def test_a_constant_that_is_nan_is_equal_to_itself():
    normfuse.rewrite(WithNan().eval(), (X,), inplace=True)
