"""Matrices side by side: the same numbers, nobody's thread settings, modes or errors lost."""

import contextvars
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from normfuse import optim
from normfuse.optim import polar, threads
from normfuse.optim.threads import Task
from torch.utils.flop_counter import FlopCounterMode

#: More than 1 MiB in float32.
LARGE = (520, 520)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """Two threads whatever the machine, and no matrix too small for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "MIN_FLOPS", 0)
    yield
    torch.set_num_threads(before)


def seen(count=8, flops=1e6):
    """Tasks that note the thread they run in, and PyTorch's number of threads there."""
    notes = []
    meet = threading.Barrier(2, timeout=60)

    def note(i):
        if i < 2:
            meet.wait()  # two threads, or this times out
        name = threading.current_thread().name
        notes.append((name, torch.get_num_threads(), torch.is_grad_enabled()))

    return notes, [Task(lambda i=i: note(i), flops, 8) for i in range(count)]


def test_tasks_run_side_by_side_with_one_thread_each():
    notes, tasks = seen()
    with torch.no_grad():
        threads.run(tasks)
    assert len(notes) == 8 and len({name for name, *_ in notes}) == 2
    assert {n for _, n, _ in notes} == {1} and not any(grad for *_, grad in notes)
    assert torch.get_num_threads() == 2
    fresh = []
    other = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert fresh == [2]  # threads begun later are as before


def test_tasks_of_the_calling_thread_keep_their_order():
    order = []
    own = [Task(lambda i=i: order.append((i, threading.current_thread()))) for i in range(4)]
    notes, apart = seen(4)
    threads.run([own[0], *apart, *own[1:]])
    assert order == [(i, threading.current_thread()) for i in range(4)] and len(notes) == 4


def test_what_is_left_to_pytorchs_threads(monkeypatch):
    def many(n, flops=1.0, scratch=8):
        return [Task(lambda: None, flops, scratch)] * n

    def shared(tasks):
        own, apart, _ = threads.share_out(tasks)
        assert sorted(map(id, own + apart)) == sorted(map(id, tasks))
        return len(own)

    assert shared([]) == 0 and shared(many(1)) == 1
    assert shared(many(8)) == 0
    assert shared(many(9)) == 1  # the last one would keep one thread waiting
    assert shared(many(2) + many(1, 10.0)) == 1
    assert shared(many(2) + many(1, 2.0)) == 0  # two and one beside each other
    assert shared(many(8, scratch=threads.MAX_SCRATCH_BYTES)) == 8
    with FlopCounterMode(display=False), torch.no_grad():
        assert shared(many(8)) == 8
    with torch.device("cpu"):
        assert shared(many(8)) == 8
    with torch.profiler.profile():
        assert shared(many(8)) == 8
    inside = []
    threads.run([Task(lambda: inside.append(shared(many(8))), 1.0, 8)] * 8)
    assert inside == [8] * 8
    torch.set_num_threads(1)
    assert shared(many(8)) == 8
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "MIN_FLOPS", 100)
    assert shared(many(8)) == 8


def test_an_error_is_raised_and_the_next_run_works():
    done = []

    def fail():
        raise ArithmeticError("no")

    tasks = [Task(fail, 9.0, 8), *([Task(lambda: done.append(1), 1.0, 8)] * 20)]
    with pytest.raises(ArithmeticError, match="no"):
        threads.run(tasks)
    done.clear()
    threads.run(tasks[1:])
    assert len(done) == 20


def test_what_compiles_has_the_threads_for_itself():
    now, alone, together = [], [], threading.Barrier(2, timeout=60)

    def note(i):
        now.append(i)
        if i in (3, 4):
            time.sleep(0.05)
            alone.append((tuple(now), threading.current_thread().name))
        elif i in (0, 1):
            together.wait()
        now.remove(i)

    threads.run([Task(lambda i=i: note(i), 1.0, 8, compiles=i in (3, 4)) for i in range(7)])
    assert [n for n, _ in alone] == [(3,), (4,)] and not now
    assert all(name.startswith("normfuse-optim") for _, name in alone)
    threads.run([Task(lambda: now.append(1), 1.0, 8, compiles=True)] * 4)
    assert now == [1] * 4


def test_the_default_number_of_threads_and_the_context_are_kept():
    """Of threads begun later, also where another thread than the user's made the pool."""
    seen_by = []

    def look():
        seen_by.append(torch.get_num_threads())

    def elsewhere():
        torch.get_num_threads()  # this thread computes with two
        began.set()
        changed.wait(60)
        threads._forget()
        threads.run(seen(4)[1])

    began, changed = threading.Event(), threading.Event()
    other = threading.Thread(target=elsewhere)
    other.start()
    began.wait(60)
    torch.set_num_threads(3)
    changed.set()
    other.join()
    after = threading.Thread(target=look)
    after.start()
    after.join()
    assert seen_by == [3] and torch.get_num_threads() == 3

    variable = contextvars.ContextVar("variable", default=0)
    variable.set(5)
    values = []
    threads.run([Task(lambda: values.append(variable.get()), 1.0, 8)] * 6)
    assert values == [5] * 6


def test_where_no_thread_can_be_had(monkeypatch):
    def refuse(size):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_pool", refuse)
    done = []
    threads.run([Task(lambda: done.append(threading.current_thread()), 1.0, 8)] * 4)
    assert done == [threading.current_thread()] * 4


def test_a_thread_steps_on_after_the_main_one_has_ended():
    code = """
import threading, time, torch
from normfuse import optim
torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.randn(600, 600)) for _ in range(6)]
opt = optim.Muon(params, lr=0.1)
def train():
    for i in range(2):
        time.sleep(0.3)
        for p in params:
            p.grad = torch.randn(600, 600)
        opt.step()
    print("done")
threading.Thread(target=train).start()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "done" and not out.stderr, out.stderr


def test_flops_are_counted():
    g = torch.randn(6, 20, 30)
    with FlopCounterMode(display=False) as counter:
        optim.orthogonalize(g, method="direct", coefficients="jordan")
    assert counter.get_total_flops() == 6 * 5 * (4 * 20 * 20 * 30 + 2 * 20**3)


def test_inference_tensors_are_stepped():
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.randn(*LARGE))
        q = torch.nn.Parameter(torch.randn(*LARGE))
        opt = optim.Muon([p, q], lr=0.1)
        p.grad, q.grad = torch.randn(*LARGE), torch.randn(*LARGE)
        before = p.clone()
        opt.step()
        assert not torch.equal(p, before)


@pytest.mark.parametrize("shape", [(4, 24, 40), (5, 330, 350), (3, 350, 330)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonalize_is_the_same_to_rounding(shape, dtype, monkeypatch):
    g = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    g[1] = 0
    g[2, 0, 0] = torch.inf
    lists = [g, g[0].mT.contiguous(), g[0]]
    got = optim.orthogonalize(g), optim.orthogonalize(lists)
    assert torch.equal(got[0], optim.orthogonalize(g))  # and from run to run to the bit
    monkeypatch.setattr(threads, "available", lambda: 1)
    want = optim.orthogonalize(g), optim.orthogonalize(lists)
    atol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    assert not got[0][1].any() and not got[0][2].any()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["Muon", "NorMuon", "SinkGD", "ARO", "SWAN"])
def test_steps_are_the_same_to_rounding(name, compile, monkeypatch):
    shapes = [(300, 900)] * 3 + [(900, 300), (20, 30), (20, 30), (7,), (64, 48), (48, 64)]
    results = []
    for side_by_side in (True, False):
        if not side_by_side:
            monkeypatch.setattr(threads, "available", lambda: 1)
        rng = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=rng)) for s in shapes]
        groups = [
            {"params": [p for p in params if p.ndim == 2]},
            {"params": [p for p in params if p.ndim == 1], "algorithm": "adamw"},
        ]
        opt = getattr(optim, name)(groups, lr=0.01, weight_decay=0.1, compile=compile)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=rng)
            opt.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results, rtol=0, atol=2e-5)


def test_large_matrices_step_in_threads_of_their_own(monkeypatch):
    where = []
    plain = polar.orthogonalize_batch

    def watched(x, s):
        where.append((threading.current_thread().name, torch.get_num_threads()))
        return plain(x, s)

    monkeypatch.setattr(polar, "orthogonalize_batch", watched)
    params = [torch.nn.Parameter(torch.randn(*LARGE)) for _ in range(6)]
    for p in params:
        p.grad = torch.randn(*LARGE)
    opt = optim.Muon(params, lr=0.1)
    opt.step()
    assert len(where) == 6 and {n for _, n in where} == {1}
    assert all(name.startswith("normfuse-optim") for name, _ in where)


def test_steps_in_several_threads_at_once():
    def train(seed):
        rng = torch.Generator().manual_seed(seed)
        params = [torch.nn.Parameter(torch.randn(*LARGE, generator=rng)) for _ in range(3)]
        opt = optim.Muon(params, lr=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=rng)
            opt.step()
        return [p.detach() for p in params]

    alone = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, range(4)))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, torch
from normfuse.optim import threads
from normfuse.optim.threads import Task
torch.set_num_threads(2)
threads.MIN_FLOPS = 0
def names():
    import threading
    out, meet = [], threading.Barrier(2, timeout=30)
    threads.run([Task(lambda: (meet.wait(), out.append(threading.get_ident())), 1.0, 1)] * 2)
    return out
assert len(set(names())) == 2
pid = os.fork()
if pid == 0:
    os._exit(0 if len(set(names())) == 2 else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
