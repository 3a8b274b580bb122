"""Error inputs that PyTorch checks on all its optimizers, on ours."""

import pytest
import torch
from normfuse import optim

common = pytest.importorskip("torch.testing._internal.common_optimizers")

NAMES = ["Muon", "NorMuon", "ROOT", "SCALE", "SinkGD", "AdamW", "AdamP", "Conda", "ARO"]


def expected(kind, text):
    if issubclass(kind, Warning):
        return pytest.warns(kind, match=text)
    # complex parameters are refused at construction, by ValueError, where torch waits for a step
    return pytest.raises((kind, ValueError), match=text)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice_is_updated_once():
    p, q = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    twice, once = optim.Muon([p, p], lr=0.1), optim.Muon([q], lr=0.1)
    for _ in range(2):
        p.grad = q.grad = torch.eye(2)
        twice.step()
        once.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", NAMES)
def test_error_inputs(name):
    cls = getattr(optim, name)
    checked = 0
    for error in common.get_error_inputs_for_all_optims("cpu", torch.float32):
        if "foreach" in error.optimizer_error_input.kwargs:
            continue
        with expected(error.error_type, error.error_regex):
            cls(error.optimizer_error_input.params, **error.optimizer_error_input.kwargs)
        checked += 1
    assert checked >= 3


def test_muon_inputs_of_torch():
    shapes = [(4, 6), (6, 4)]
    for case in common.optim_inputs_func_muon(device="cpu"):
        ps = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
        before = [p.detach().clone() for p in ps]
        opt = optim.Muon(ps, **case.kwargs)
        for p in ps:
            p.grad = p.detach().clone()
        opt.step()
        for p, b in zip(ps, before, strict=True):
            assert float((p * b).sum()) < float((b * b).sum()), case.desc  # downhill
    for error in common.optim_error_inputs_func_muon(device="cpu", dtype=torch.float32):
        e = error.optimizer_error_input
        with expected(error.error_type, None):
            optim.Muon(e.params, **e.kwargs).step()
