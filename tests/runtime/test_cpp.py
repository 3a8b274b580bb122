"""Our C++ for CPUs: what it multiplies, and how it is built and done without."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from normfuse import optim
from normfuse.optim import kernel_products as kp
from normfuse.runtime import autotune_cache, cpp, doctor
from normfuse.runtime.cpp import library, products
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
SYMMETRIC = "symmetric"
absent = library.why_absent(SYMMETRIC)
here = pytest.mark.skipif(bool(absent), reason=absent or "built")


def matrices(*shape, dtype=torch.float64, layout="rows", seed=0):
    rng = torch.Generator().manual_seed(seed)
    *batch, r, c = shape
    if layout == "rows":
        return torch.randn(*shape, dtype=dtype, generator=rng)
    if layout == "columns":
        return torch.randn(*batch, c, r, dtype=dtype, generator=rng).mT
    return torch.randn(*batch, r, 2 * c, dtype=dtype, generator=rng)[..., ::2]  # neither


def polynomials(batch, side, dtype):
    """Two symmetric matrices that commute."""
    s = matrices(batch, side, side, dtype=torch.float64)
    s = (s + s.mT) / side
    t = s @ s - 0.5 * s
    return tuple(((v + v.mT) / 2).to(dtype) for v in (s, t))


def close(got, want, dtype):
    scale = want.abs().max().clamp_min(1e-30)
    return float((got.double() - want).abs().max() / scale) < (
        1e-13 if dtype == torch.float64 else 3e-6
    )


sides = st.one_of(st.integers(1, 40), st.sampled_from([64, 95, 96, 97, 191, 257, 300]))
layouts = st.sampled_from(["rows", "columns", "neither"])


@here
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), sides, sides, sides, layouts, layouts, layouts, layouts,
    st.sampled_from([torch.float32, torch.float64]), st.sampled_from([0.0, 1.0, -2.5]),
)  # fmt: skip
def test_products(batch, m, n, k, left, right, third, fourth, dtype, beta):
    a, b = matrices(batch, m, k, layout=left), matrices(batch, k, n, layout=right, seed=1)
    base = matrices(batch, m, n, layout=third, seed=2)
    out = torch.full_like(matrices(batch, m, n, layout=fourth), float("nan"), dtype=dtype)
    args = [v.to(dtype) for v in (a, b, base)]
    want = 0.5 * args[0].double() @ args[1].double() + beta * args[2].double()
    got = cpp.product(*args[:2], out, base=args[2] if beta else None, alpha=0.5, beta=beta)
    assert got is out and close(got, want, dtype)


@here
@settings(max_examples=60, deadline=None)
@example(1, 18, 1, False, 2, torch.float64)
@given(
    st.integers(1, 5), sides, sides, st.booleans(), st.integers(1, 5),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_symmetric_products(batch, m, k, tall, threads, dtype):
    x = matrices(batch, *((k, m) if tall else (m, k)), dtype=dtype)
    left, right = (x.mT, x) if tall else (x, x.mT)
    s, t = polynomials(batch, m, dtype)
    default = torch.get_num_threads()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            gram, poly = (torch.full((batch, m, m), float("nan"), dtype=dtype) for _ in range(2))
            cpp.product(left, right, gram, symmetric=True)
            cpp.product(s, t, poly, base=s, alpha=-3.0, beta=2.0, symmetric=True)
        finally:
            torch.set_num_threads(default)
        assert close(gram, left.double() @ right.double(), dtype)
        assert close(poly, 2 * s.double() - 3 * s.double() @ t.double(), dtype)
        assert torch.equal(gram, gram.mT) and torch.equal(poly, poly.mT)
        results.append((gram, poly))
    for one, more in zip(*results, strict=True):
        assert torch.equal(one, more)  # whoever computes a part


@here
def test_a_matrix_gives_the_same_whatever_it_is_batched_with():
    x = matrices(7, 100, 230, dtype=torch.float32)
    whole = cpp.product(x, x.mT, x.new_empty(7, 100, 100), symmetric=True)
    for i in range(7):
        part = cpp.product(x[i : i + 1], x[i : i + 1].mT, x.new_empty(1, 100, 100), symmetric=True)
        assert torch.equal(part[0], whole[i])
    x[3, 5, 6] = float("nan")
    again = cpp.product(x, x.mT, x.new_empty(7, 100, 100), symmetric=True)
    assert again[3].isnan().any() and torch.equal(
        again[[0, 1, 2, 4, 5, 6]], whole[[0, 1, 2, 4, 5, 6]]
    )


@here
def test_nothing_beyond_the_result_is_written():
    room = torch.full((3, 50, 70), 7.0)
    x = matrices(3, 33, 20, dtype=torch.float32)
    out = room[:, 5:38, 11:44]
    cpp.product(x, x.mT, out, symmetric=True)
    assert close(out, x.double() @ x.mT.double(), torch.float32)
    room[:, 5:38, 11:44] = 7.0
    assert (room == 7.0).all()
    empty = cpp.product(x[:0], x[:0].mT, x.new_empty(0, 33, 33), symmetric=True)
    assert empty.shape == (0, 33, 33)


@here
def test_where_it_is_used(monkeypatch):
    assert kp.native(64, 64, torch.float32, CPU) and kp.native(300, 64, torch.float64, CPU)
    assert not kp.native(63, 300, torch.float32, CPU)
    assert not kp.native(300, 300, torch.bfloat16, CPU)
    assert not kp.native(300, 300, torch.float32, torch.device("cuda"))
    with kp.kernels("never"):
        assert not kp.native(300, 300, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter:  # it would not see our products
        optim.orthogonalize(torch.randn(2, 80, 90), method="direct", coefficients="jordan")
    assert counter.get_total_flops() == 2 * 5 * (4 * 80 * 80 * 90 + 2 * 80**3)
    for member in (optim.Muon, optim.SWAN):  # their operators are counted as what they execute
        p = torch.nn.Parameter(torch.randn(80, 90))
        p.grad = torch.randn(80, 90)
        with FlopCounterMode(display=False) as counter:
            member([p], lr=0.1).step()
        assert 5 * 80 * 80 * 90 < counter.get_total_flops() < 100 * 80 * 80 * 90
    called = []
    plain = products._function

    def watched(dtype):
        called.append(dtype)
        return plain(dtype)

    monkeypatch.setattr(products, "_function", watched)
    optim.orthogonalize(torch.randn(2, 80, 90))
    assert called


@here
def test_tensors_whose_memory_is_not_theirs_are_left_to_pytorch():
    x = torch.randn(2, 80, 100)
    want = optim.orthogonalize(x)

    def close(got):
        return float((got - want).norm() / want.norm()) < 1e-4

    assert close(torch.func.functionalize(optim.orthogonalize)(x))
    assert close(optim.orthogonalize(TwoTensor(x, x.clone())).a)
    seen = []
    torch.func.grad(lambda t: seen.append(optim.orthogonalize(t)) or t.sum())(x)
    assert len(seen) == 1
    for lazy in (torch._neg_view(x), torch._efficientzerotensor(2, 80, 100)):
        assert not cpp.is_plain(lazy)
    assert cpp.is_plain(x) and cpp.is_plain(torch.nn.Parameter(x)) and cpp.is_plain(x.mT)
    nothing = cpp.product(x[:, :, :0], x.mT[:, :0], torch.empty(2, 80, 80), base=None)
    assert (nothing == 0).all()


@here
@pytest.mark.parametrize("shape", [(3, 70, 200), (200, 70), (2, 100, 100), (340, 350)])
@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("normalization", ["frobenius", "schatten", "aol"])
def test_polar_factors_are_those_of_the_library(shape, method, normalization):
    def factors(x):
        return optim.orthogonalize(x, 5, method, normalization=normalization)

    x = matrices(*shape)
    got, got32 = factors(x), factors(x.float())
    with kp.kernels("never"):
        want = factors(x)
    assert float((got - want).norm() / want.norm()) < 1e-11
    assert float((got32 - want).norm() / want.norm()) < 3e-4


def fresh(monkeypatch, tmp_path, **environment):
    monkeypatch.setenv(autotune_cache.ENV, str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    library._load_once.cache_clear()
    products._function.cache_clear()


@pytest.fixture
def as_before():
    yield
    library._load_once.cache_clear()
    products._function.cache_clear()


@here
def test_built_once_and_again_if_damaged(monkeypatch, tmp_path, as_before):
    fresh(monkeypatch, tmp_path)
    assert library.load(SYMMETRIC) is not None and library.why_absent(SYMMETRIC) == ""
    (file,) = tmp_path.iterdir()  # and nothing left beside it
    stamp = file.stat().st_mtime_ns
    fresh(monkeypatch, tmp_path)
    assert library.load(SYMMETRIC) is not None and file.stat().st_mtime_ns == stamp
    whole = file.read_bytes()
    for size in (0, 14, 4096, len(whole) - 4096):  # to load some of these would kill the process
        damaged = tmp_path / str(size)
        damaged.mkdir()
        (damaged / file.name).write_bytes(whole[:size])
        fresh(monkeypatch, damaged)
        assert library.load(SYMMETRIC) is not None and (damaged / file.name).read_bytes() == whole


@here
def test_processes_build_at_the_same_time(tmp_path):
    code = "from normfuse.runtime.cpp import library as l; assert l.load('symmetric')"
    env = {**os.environ, autotune_cache.ENV: str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(3)]
    assert [r.wait(timeout=120) for r in runs] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "compiler, said",
    [
        ("no-such-compiler", "no compiler no-such-compiler"),
        ("broken", "broken failed: it is broken"),
        ("clang-like", "is clang; GCC is needed"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="shell scripts")
def test_without_a_compiler_pytorch_multiplies(compiler, said, monkeypatch, tmp_path, as_before):
    if torch.backends.cpu.get_cpu_capability() not in library._TARGETS:
        pytest.skip("not a processor it is written for")
    for name, text in (
        ("broken", "echo it is broken >&2; exit 1"),
        ("clang-like", "echo clang 18"),
    ):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    chosen = compiler if compiler.startswith("no-") else str(tmp_path / compiler)
    fresh(monkeypatch, tmp_path / "cache", CXX=chosen)
    assert library.load(SYMMETRIC) is None and said in library.why_absent(SYMMETRIC)
    (line,) = [f for f in doctor.examine().findings if f.what == "symmetric products on CPUs"]
    assert line.state == "PyTorch's" and line.ok is None and said in line.advice
    x = matrices(2, 100, 130)
    got = optim.orthogonalize(x)
    assert not kp.native(100, 130, torch.float64, CPU)
    s = torch.linalg.svdvals(got)
    assert s.min() > 0.5 and s.max() < 1.3


@here
def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, as_before):
    blocked = tmp_path / "file"
    blocked.write_text("")
    fresh(monkeypatch, blocked)
    said = library.why_absent(SYMMETRIC)
    assert library.load(SYMMETRIC) is None and autotune_cache.ENV in said
    assert "FileExistsError" in said or "NotADirectory" in said


@here
def test_a_compiler_with_arguments_and_no_home(monkeypatch, tmp_path, as_before):
    wrapper = tmp_path / "a wrapper"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    fresh(monkeypatch, tmp_path / "a cache", CXX=f"'{wrapper}' g++")
    assert library.load(SYMMETRIC) is not None

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.chdir(tmp_path)
    fresh(monkeypatch, ".")
    assert library.load(SYMMETRIC) is not None
    fresh(monkeypatch, ".")
    monkeypatch.setattr(library, "directory", homeless)
    assert library.load(SYMMETRIC) is None and autotune_cache.ENV in library.why_absent(SYMMETRIC)


@here
def test_another_processor(monkeypatch, tmp_path, as_before):
    fresh(monkeypatch, tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert library.load(SYMMETRIC) is None and "DEFAULT" in library.why_absent(SYMMETRIC)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("target", sorted(library._TARGETS))
def test_compiles_for_every_target_without_spilling_the_tile(target, tmp_path):
    """The innermost loop multiplies from registers: no accumulator is stored within it."""
    file = tmp_path / "symmetric.s"
    flags = [f for f in (*library._FLAGS, *library._TARGETS[target]) if f != "-shared"]
    command = ["g++", *flags, "-Wall", "-Werror", "-S", "-o", str(file)]
    subprocess.run([*command, str(library._FOLDER / "symmetric.cpp")], check=True)
    rows = {"AVX2": 6, "AVX512": 12}[target]
    loops = blocks(file.read_text())
    inner = [b for b in loops if sum("vfmadd" in line for line in b) == 2 * rows]
    assert len(inner) >= 4, "both precisions, a packed and not"
    register = "%ymm" if target == "AVX2" else "%zmm"
    for block in inner:
        moves = [line.split(",") for line in block if "mov" in line]
        assert not [m for m in moves if register in m[0] and "(" in m[-1]], block


def blocks(assembly):
    """Loops without a branch inside: from a label to the jump back to it."""
    out, label, block = [], None, []
    for line in assembly.splitlines():
        text = line.strip()
        if text.endswith(":"):
            label, block = text[:-1], []
        elif text.startswith("j"):
            if label is not None and text.split()[-1] == label:
                out.append(block)
            label = None
        elif not text.startswith("."):
            block.append(text)
    return out
