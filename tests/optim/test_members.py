"""Every member against an independent float64 oracle written in numpy, one matrix at a time."""

import math

import numpy as np
import pytest
import torch
from normfuse import optim
from normfuse.optim import buckets, kernel_products
from normfuse.optim import coefficients as co

STEPS = 22
SHAPES = {
    "tall": (12, 7),
    "wide": (7, 12),
    "square": (8, 8),
    "row": (1, 6),
    "column": (6, 1),
    "conv": (6, 2, 3, 3),
    "twin": (7, 12),
    "zero": (5, 4),
    "rank-1": (6, 9),
}
JORDAN = ((3.4445, -4.7750, 2.0315),)


def gradients(seed=0, rank_one=True):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(STEPS):
        g = {k: rng.standard_normal(s) * rng.choice([1e-3, 1.0, 30.0]) for k, s in SHAPES.items()}
        g["zero"] = np.zeros(SHAPES["zero"])
        if rank_one:
            r, c = SHAPES["rank-1"]
            g["rank-1"] = np.outer(rng.standard_normal(r), rng.standard_normal(c))
        out.append(g)
    return out


def polar_map(g, schedule):
    """The composed polynomial on the singular values of ``g/‖g‖``."""
    u, s, vh = np.linalg.svd(g, full_matrices=False)
    norm = math.sqrt((s**2).sum())
    if norm == 0:
        return np.zeros_like(g)
    s = s / norm
    for a, b, c in schedule:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vh


class Oracle:
    """One matrix; subclasses give ``direction(g)``. Decay first unless said otherwise."""

    def __init__(self, p, lr, wd):
        self.p, self.lr, self.wd, self.t = p.copy(), lr, wd, 0
        self.s = {}

    def average(self, g, mu=0.95, nesterov=True):
        b = self.s["m"] = mu * self.s.get("m", 0 * g) + (1 - mu) * g
        return (1 - mu) * g + mu * b if nesterov else b

    def step(self, g):
        self.t += 1
        d = self.direction(g)
        self.p = self.p * (1 - self.lr * self.wd) - self.lr * d


class MuonOracle(Oracle):
    def direction(self, g):
        r, c = g.shape
        return math.sqrt(max(1, r / c)) * polar_map(self.average(g), JORDAN * 5)


class MoonlightOracle(Oracle):
    def direction(self, g):
        b = self.s["m"] = 0.95 * self.s.get("m", 0 * g) + g
        return 0.2 * math.sqrt(max(g.shape)) * polar_map(g + 0.95 * b, JORDAN * 5)


class NorMuonOracle(Oracle):
    axis = 1

    def direction(self, g):
        r, c = g.shape
        o = polar_map(self.average(g), JORDAN * 5)
        before = np.linalg.norm(o)
        v = self.s.get("v", 0.0)
        v = self.s["v"] = v + 0.05 * ((o**2).mean(self.pick(r, c), keepdims=True) - v)
        o = o / (np.sqrt(v) + 1e-10)
        o = o * before / (np.linalg.norm(o) + 1e-10)
        return o * math.sqrt(max(1, r / c))

    def pick(self, r, c):
        return 1


class NorMuonShortOracle(NorMuonOracle):
    def pick(self, r, c):
        return 1 if r >= c else 0


class NorMuonPaperOracle(NorMuonOracle):
    def direction(self, g):
        r, c = g.shape
        o = polar_map(self.average(g), JORDAN * 5)
        v = self.s.get("v", 0.0)
        v = self.s["v"] = 0.95 * v + 0.05 * (o**2).mean(1, keepdims=True)
        o = o / (np.sqrt(v) + 1e-10)
        n = np.linalg.norm(o)
        return o * 0.2 * math.sqrt(r * c) / n if n else o


class ROOTOracle(Oracle):
    def direction(self, g):
        b = self.s["m"] = 0.95 * self.s.get("m", 0 * g) + g
        b = g + 0.95 * b
        eps = np.quantile(np.abs(b), 0.9) + 1e-9
        outliers = np.sign(b) * np.maximum(np.abs(b) - eps, 0)
        return 0.2 * math.sqrt(max(g.shape)) * polar_map(b - outliers, JORDAN * 5)


class AuONOracle(Oracle):
    def direction(self, g):
        b = self.average(g)
        x = b / (np.linalg.norm(b) or 1.0)
        return x / (np.sqrt((np.cosh(x) ** 2).mean()) + 1e-8)


class AuONCodeOracle(Oracle):
    def direction(self, g):
        b = self.average(g)
        x = 1.5 * b / (np.linalg.norm(b) or 1.0)
        return b / (np.sqrt((np.cosh(x) ** 2).mean()) + 1e-8)


class HybridOracle(Oracle):
    def direction(self, g):
        x = polar_map(self.average(g), JORDAN)
        return x / (np.sqrt((np.cosh(x) ** 2).mean()) + 1e-8)


class SCALEOracle(Oracle):
    def direction(self, g):
        return g / np.maximum(np.sqrt((g**2).mean(1, keepdims=True)), 1e-8)


class SCALEHeadOracle(Oracle):
    def direction(self, g):
        b = self.average(g, 0.9, nesterov=False)
        return b / np.maximum(np.sqrt((b**2).mean(0, keepdims=True)), 1e-8)


class SinkGDOracle(Oracle):
    def step(self, g):
        x = g.copy()
        r, c = x.shape
        for _ in range(5):
            for i in range(r):
                x[i] *= math.sqrt(c) / max(np.linalg.norm(x[i]), 1e-8)
            for j in range(c):
                x[:, j] *= math.sqrt(r) / max(np.linalg.norm(x[:, j]), 1e-8)
        rate = 0.05 * self.lr
        self.p = self.p * (1 - rate * self.wd) - rate * x


class SWANOracle(Oracle):
    """Converged: the polar factor of the row-standardized gradient at its norm."""

    def direction(self, g):
        x = g - g.mean(1, keepdims=True)
        x = x / (np.sqrt((x**2).mean(1, keepdims=True)) + 1e-8)
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        keep = (s > 1e-9 * max(s[0], 1e-300)).astype(float)
        o = (u * keep) @ vh
        n = np.linalg.norm(o)
        return o * np.linalg.norm(x) / n if n else o


class SWANCoupledOracle(Oracle):
    """Exactly ``iterations`` coupled steps, as a scalar recurrence on squared singular values."""

    def direction(self, g):
        x = g - g.mean(1, keepdims=True)
        x = x / (np.sqrt((x**2).mean(1, keepdims=True)) + 1e-8)
        norm = np.linalg.norm(x)
        if not norm:
            return x
        u, s, vh = np.linalg.svd(x / norm, full_matrices=False)
        y, z = s**2, np.ones_like(s)
        for _ in range(10):
            t = 3 - z * y
            y, z = y * t / 2, z * t / 2
        o = (u * (s * z)) @ vh
        return o * norm / np.linalg.norm(o)


class MuonMuPOracle(MuonOracle):
    """Spectral norm from two power iterations started at the heaviest row of the Gram matrix."""

    def direction(self, g):
        r, c = g.shape
        o = polar_map(self.average(g), JORDAN * 5)
        size = np.linalg.norm(o)
        if not size:
            return o
        x = (o if r <= c else o.T) / size
        gram = x @ x.T
        v = gram[np.argmax((gram**2).sum(1))]
        for _ in range(2):
            v = gram @ (v / np.linalg.norm(v))
        return math.sqrt(r / c) * o / (size * math.sqrt(np.linalg.norm(v)))


class AdamWOracle(Oracle):
    def direction(self, g):
        m = self.s["m"] = 0.9 * self.s.get("m", 0) + 0.1 * g
        v = self.s["v"] = 0.999 * self.s.get("v", 0) + 0.001 * g * g
        return (m / (1 - 0.9**self.t)) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)


def remove_radial(p, g, d):
    """AdamP's projection, row by row in Python; returns (direction, decay ratio)."""
    for view in (p.shape, (1, p.size)):
        P, G, D = (x.reshape(view) for x in (p, g, d.copy()))
        cos = [
            abs(gi @ pi) / (max(np.linalg.norm(gi), 1e-8) * max(np.linalg.norm(pi), 1e-8))
            for gi, pi in zip(G, P, strict=True)
        ]
        if max(cos) < 0.1 / math.sqrt(view[1]):
            for i in range(view[0]):
                n = P[i] / (np.linalg.norm(P[i]) + 1e-8)
                D[i] -= n * (n @ D[i])
            return D.reshape(p.shape), 0.1
    return d, 1.0


class AdamPOracle(AdamWOracle):
    def step(self, g):
        self.t += 1
        d, ratio = remove_radial(self.p, g, self.direction(g))
        self.p = self.p * (1 - self.lr * self.wd * ratio) - self.lr * d


class SGDPOracle(Oracle):
    def step(self, g):
        b = self.s["m"] = 0.9 * self.s.get("m", 0) + g
        d, ratio = remove_radial(self.p, g, g + 0.9 * b)
        self.p = self.p * (1 - self.lr * self.wd * ratio / (1 - 0.9)) - self.lr * d


class CondaOracle(Oracle):
    def step(self, g):
        m = self.s["m"] = 0.9 * self.s.get("m", 0) + 0.1 * g
        tall = g.shape[0] >= g.shape[1]
        if self.t % 5 == 0:
            u, _, vh = np.linalg.svd(m, full_matrices=False)
            self.q = vh if tall else u
        self.t += 1
        proj = (lambda x: x @ self.q.T) if tall else (lambda x: self.q.T @ x)
        v = self.s["v"] = 0.999 * self.s.get("v", 0) + 0.001 * proj(g) ** 2
        n = proj(m) / (np.sqrt(v) + 1e-8)
        rate = self.lr * math.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t) * 0.25
        self.p = self.p - rate * (n @ self.q if tall else self.q @ n)
        self.p = self.p - self.lr * self.wd * self.p


class AROOracle(Oracle):
    def f(self, x):
        for _ in range(5):
            r, c = np.linalg.norm(x, axis=1), np.linalg.norm(x, axis=0)
            x = x / np.where(r > 0, r, 1)[:, None] / np.where(c > 0, c, 1)[None]
            x = x / (np.sqrt((x**2).mean()) or 1.0)
        return x

    def direction(self, g):
        d = self.rotated(g.T if g.shape[0] > g.shape[1] else g)
        return d.T if g.shape[0] > g.shape[1] else d

    def rotated(self, g):
        m = self.average(g, nesterov=False)
        n = np.linalg.norm(m)
        if not n:
            return m
        m = m / n
        r = self.s.get("r", np.eye(g.shape[0]))
        q, upper = np.linalg.qr(m @ self.f(r.T @ m).T)
        self.s["r"] = q = q * np.where(np.diag(upper) < 0, -1, 1)
        d = q @ self.f(q.T @ m)
        return d * 0.2 / np.sqrt((d**2).mean())


MEMBERS = {
    "Muon": (optim.Muon, {}, MuonOracle),
    "Muon-gram": (optim.Muon, {"ns_method": "gram"}, MuonOracle),
    "Moonlight": (
        optim.Muon,
        {"momentum_style": "heavy_ball", "adjust_lr_fn": "match_rms_adamw"},
        MoonlightOracle,
    ),
    "NorMuon": (optim.NorMuon, {}, NorMuonOracle),
    "NorMuon-short": (optim.NorMuon, {"reduce": "short"}, NorMuonShortOracle),
    "NorMuon-paper": (optim.NorMuon, {"form": "paper"}, NorMuonPaperOracle),
    "ROOT": (optim.ROOT, {}, ROOTOracle),
    "AuON": (optim.AuON, {}, AuONOracle),
    "AuON-code": (optim.AuON, {"form": "code"}, AuONCodeOracle),
    "HybridAuON": (optim.HybridAuON, {}, HybridOracle),
    "SCALE": (optim.SCALE, {}, SCALEOracle),
    "SCALE-head": (optim.SCALE, {"head": True, "lines": "cols"}, SCALEHeadOracle),
    "SinkGD": (optim.SinkGD, {}, SinkGDOracle),
    "SWAN": (optim.SWAN, {}, SWANCoupledOracle),
    "MuonMuP": (optim.MuonMuP, {}, MuonMuPOracle),
    "AdamW": (optim.AdamW, {}, AdamWOracle),
    "AdamP": (optim.AdamP, {}, AdamPOracle),
    "SGDP": (optim.SGDP, {"momentum": 0.9, "nesterov": True}, SGDPOracle),
    "Conda": (optim.Conda, {"gap": 5, "scale": 0.25}, CondaOracle),
    "ARO": (optim.ARO, {}, AROOracle),
}


def make(cls, dtype, lr, wd, entries, rng):
    params = {
        k: torch.nn.Parameter(torch.as_tensor(rng.standard_normal(s)).to(dtype))
        for k, s in SHAPES.items()
    }
    groups = [{"params": list(params.values()), "view": "flatten"}]
    return params, cls(groups, lr=lr, weight_decay=wd, **entries)


@pytest.mark.parametrize("name", MEMBERS)
def test_member_equals_its_oracle(name):
    cls, entries, oracle = MEMBERS[name]
    params, opt = make(cls, torch.float64, 0.03, 0.1, entries, np.random.default_rng(1))
    # QR and SVD of rank-deficient matrices are not unique: full rank for the rotated members
    rotated = name in ("ARO", "Conda")
    flat = {k: (p.shape[0], p.numel() // p.shape[0]) for k, p in params.items()}
    oracles = {k: oracle(p.detach().numpy().reshape(flat[k]), 0.03, 0.1) for k, p in params.items()}
    for g in gradients(rank_one=not rotated):
        for k, p in params.items():
            p.grad = torch.as_tensor(g[k]).clone()
            kept = p.grad.clone()
            oracles[k].step(g[k].reshape(flat[k]))
        opt.step()
        assert torch.equal(kept, p.grad)  # gradients are only read
    for k, p in params.items():
        got = p.detach().numpy().reshape(flat[k])
        np.testing.assert_allclose(got, oracles[k].p, rtol=0, atol=2e-7, err_msg=k)


@pytest.mark.parametrize("threads_bytes", [1, 400])
@pytest.mark.parametrize("name", ["NorMuon", "AdamP", "SGDP", "ROOT"])
def test_portions_of_a_bucket_are_the_bucket(name, threads_bytes, monkeypatch):
    # eager CPU steps take a few matrices at a time: every way to cut gives the same numbers
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    results = []
    for size in (2**20, threads_bytes):
        monkeypatch.setattr(buckets, "CACHE_BYTES", size)
        monkeypatch.setattr(buckets, "PORTION_BYTES", size)
        rng = np.random.default_rng(3)
        params = [
            torch.nn.Parameter(torch.as_tensor(rng.standard_normal((6, 8)))) for _ in range(7)
        ]
        stack = torch.nn.Parameter(torch.as_tensor(rng.standard_normal((3, 6, 8))))
        groups = [{"params": [*params[:4], stack, *params[4:]], "view": "batch"}]
        opt = getattr(optim, name)(groups, lr=0.03, weight_decay=0.1)
        for i in range(4):
            for j, p in enumerate([*params, stack]):
                p.grad = torch.as_tensor(rng.standard_normal(tuple(p.shape)))
                if j == 2 and i == 1:
                    p.grad = None
                elif j == 5 and i == 2:
                    p.grad[0, 0] = math.nan
            opt.step()
        if size == 1:
            for bucket in opt._current():
                assert len(bucket._portions(range(len(bucket.slots)))) == len(bucket.slots)
        results.append([p.detach().clone() for p in (*params, stack)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("dtype,atol", [(torch.float32, 2e-4), (torch.bfloat16, 0.15)])
def test_lower_precision_follows_float64(name, dtype, atol):
    cls, entries, oracle = MEMBERS[name]
    params, opt = make(cls, dtype, 0.03, 0.1, entries, np.random.default_rng(1))
    flat = {k: (p.shape[0], p.numel() // p.shape[0]) for k, p in params.items()}
    oracles = {
        k: oracle(p.detach().double().numpy().reshape(flat[k]), 0.03, 0.1)
        for k, p in params.items()
    }
    generic = ("tall", "wide", "conv", "twin", "zero")
    steps = 10 if name not in ("ARO",) else 3
    if name == "AuON-code":
        atol *= 10  # raw magnitudes up to 30
    if dtype == torch.bfloat16 and name in ("AdamP", "SGDP", "ARO", "Conda"):
        pytest.skip("thresholds and bases of rounded inputs need not agree")
    for g in gradients()[:steps]:
        for k, p in params.items():
            p.grad = torch.as_tensor(g[k]).to(dtype)
            oracles[k].step(p.grad.double().numpy().reshape(flat[k]))
        opt.step()
    for k in generic:
        got = params[k].detach().double().numpy().reshape(flat[k])
        np.testing.assert_allclose(got, oracles[k].p, rtol=2e-2 if atol > 1e-2 else 1e-3, atol=atol)


def test_swan_whitens():
    # converges to the polar factor where the condition allows; wide Gaussian rows
    g = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(torch.zeros_like(g))
    q = torch.nn.Parameter(torch.zeros(40, 6, dtype=torch.float64))
    opt = optim.SWAN([p, q], lr=1.0, iterations=25)
    h = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p.grad, q.grad = g, h
    opt.step()
    for w, grad in ((p, g), (q, h)):
        oracle = SWANOracle(np.zeros(w.shape), 1.0, 0.0)
        oracle.step(grad.numpy())
        if w is p:
            np.testing.assert_allclose(w.detach().numpy(), oracle.p, atol=1e-9)
        else:  # six columns: standardized rows keep full column rank minus one direction
            top = np.linalg.svd(w.detach().numpy(), compute_uv=False)
            assert np.isfinite(top).all()


@pytest.mark.parametrize("policy", ["auto", "never"])
@pytest.mark.parametrize("shape", [(256, 256), (128, 512), (512, 128), (340, 340)])
@pytest.mark.parametrize("iterations", [10, 16, 20])
def test_swan_stays_stable(shape, iterations, policy):
    """Rank-deficient gradients leave the iteration a null space to fill with rounding errors."""
    rng = torch.Generator().manual_seed(0)
    low = torch.randn(shape[0], 8, generator=rng) @ torch.randn(8, shape[1], generator=rng)
    for g in (low, torch.randn(shape, generator=rng)):
        steps = []
        for dtype in (torch.float64, torch.float32):
            p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
            p.grad = g.to(dtype)
            with kernel_products.kernels(policy):
                optim.SWAN([p], lr=1.0, iterations=iterations).step()
            steps.append(p.detach().double())
        assert float((steps[1] - steps[0]).norm() / steps[0].norm()) < 2e-3


def test_mup_condition():
    for shape in ((6, 20), (20, 6), (9, 9)):
        p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        opt = optim.MuonMuP([p], lr=0.5)
        p.grad = torch.randn(shape, dtype=torch.float64)
        opt.step()
        top = float(torch.linalg.matrix_norm(p.detach(), 2))
        # the iteration leaves singular values in a band around 1
        assert top == pytest.approx(0.5 * math.sqrt(shape[0] / shape[1]), rel=0.15)


def test_spectral_init():
    from normfuse.optim.muon import spectral_init_

    w = torch.randn(20, 8, dtype=torch.float64)
    spectral_init_(w, 200)
    assert float(torch.linalg.matrix_norm(w, 2)) == pytest.approx(math.sqrt(20 / 8), rel=1e-3)


def test_conda_first_step_is_closed_form():
    for shape in ((5, 9), (9, 5)):
        g = torch.randn(shape, dtype=torch.float64)
        p = torch.nn.Parameter(torch.zeros_like(g))
        p.grad = g
        optim.Conda([p], lr=1.0, eps=0.0).step()
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        want = u @ torch.sign(vh) if shape[0] < shape[1] else torch.sign(u) @ vh
        torch.testing.assert_close(-p.detach(), want)


def test_aro_with_row_norms_converges_to_the_polar_direction():
    g = torch.randn(6, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    p = torch.nn.Parameter(torch.zeros_like(g))
    opt = optim.ARO([p], lr=1.0, base="rows", momentum=0.0)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    for _ in range(200):
        before = p.detach().clone()
        p.grad = g
        opt.step()
    d = before - p.detach()
    assert float(torch.cosine_similarity(d.flatten(), (u @ vh).flatten(), 0)) > 0.9999


def test_adamp_projects_only_scale_invariant_weights():
    p = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    ref = p.detach().clone()
    g = torch.randn(4, 6, dtype=torch.float64)
    g -= ref * ((g * ref).sum(1, keepdim=True) / ref.square().sum(1, keepdim=True))
    p.grad = g
    optim.AdamP([p], lr=1.0, weight_decay=0.0).step()
    moved = p.detach() - ref
    assert float((moved * ref).sum(1).abs().max()) < 1e-7  # orthogonal to every row
    q = torch.nn.Parameter(ref.clone())
    q.grad = ref.clone()  # parallel: untouched AdamW
    optim.AdamP([q], lr=1.0).step()
    want = ref - ref / (ref.abs() + 1e-8)  # the first step of Adam, eps and all
    torch.testing.assert_close(q.detach(), want, rtol=1e-6, atol=1e-6)
    v = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))  # vectors: plain AdamW
    w = torch.nn.Parameter(v.detach().clone())
    for x in (v, w):
        x.grad = torch.arange(6.0, dtype=torch.float64) - 2.5
    optim.AdamP([v], lr=0.1).step()
    torch.optim.AdamW([w], lr=0.1, weight_decay=0).step()
    torch.testing.assert_close(v, w)


def test_root_coefficients_are_guarded():
    from normfuse.optim.muon import ROOT_COEFFICIENTS, ShapeKeyedOrthogonalize
    from normfuse.optim.polar import settings

    s = settings(coefficients=(3.4445, -4.7750, 2.0315))
    assert ShapeKeyedOrthogonalize(s).schedule(2048, 2048)[0][0] == 3.4445
    assert ShapeKeyedOrthogonalize(s, guarded=False).schedule(2048, 2048)[0][0] == 3.4916
    for shape, triple in ROOT_COEFFICIENTS.items():
        if shape != (2048, 2048):
            assert ShapeKeyedOrthogonalize(s).schedule(*shape[::-1])[0] == triple
    assert co.certify((ROOT_COEFFICIENTS[2048, 2048],) * 5, 0.54, 0.58).high == pytest.approx(
        3.31, abs=0.01
    )


@pytest.mark.parametrize(
    "name", ["Muon", "NorMuon", "ROOT", "HybridAuON", "AuON", "SinkGD", "SCALE"]
)
def test_scale_invariance_down_to_tiny_gradients(name):
    cls, entries, _ = MEMBERS[name]
    g = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    moves = []
    for scale in (1.0, 1e-12) if name not in ("SCALE", "ROOT") else (1.0, 1e-4):
        p = torch.nn.Parameter(torch.zeros(6, 10))
        opt = cls([p], lr=1.0, weight_decay=0.0, **entries)
        p.grad = g * scale
        opt.step()
        moves.append(p.detach().clone())
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_finite_gradients_of_any_size_make_finite_steps(name, large, monkeypatch):
    monkeypatch.setattr(buckets, "CACHE_BYTES", 1 if large else 2**40)
    cls, entries, _ = MEMBERS[name]
    g = torch.Generator().manual_seed(0)
    for sizes in ((1e25, 1e25, 1e25), (1e25, 1.0, 1.0), (1e-25, 1e36, 1e-40)):
        ps = [torch.nn.Parameter(torch.zeros(s)) for s in ((6, 4), (4, 6), (6, 4), (1, 7), (7, 1))]
        opt = cls(ps, lr=1.0, weight_decay=0.0, **entries)
        for size in sizes:
            for p in ps:
                p.grad = torch.randn(p.shape, generator=g) * size
            opt.step()
            assert all(torch.isfinite(p).all() for p in ps)


@pytest.mark.parametrize("name", ["SCALE", "SWAN", "SinkGD"])
def test_large_gradients_step_like_small_ones(name):
    cls, entries, _ = MEMBERS[name]
    grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    moves = []
    for scale in (1.0, 2.0**100):
        p = torch.nn.Parameter(torch.zeros(6, 10))
        p.grad = grad * scale
        cls([p], lr=1.0, weight_decay=0.0, **entries).step()
        moves.append(p.detach().clone())
    torch.testing.assert_close(*moves, rtol=1e-5, atol=1e-6)


def test_all_names_resolve():
    for name in ("Muon", "NorMuon", "ROOT", "AuON", "HybridAuON", "MuonMuP", "SCALE", "SinkGD"):
        assert issubclass(getattr(optim, name), torch.optim.Optimizer)
    for name in ("SWAN", "AdamW", "AdamP", "SGDP", "Conda", "ARO"):
        assert issubclass(getattr(optim, name), torch.optim.Optimizer)
    assert callable(optim.orthogonalize)
