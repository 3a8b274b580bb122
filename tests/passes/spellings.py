"""The table of spellings: every way a norm is written, and every way something is almost a norm.

Each spelling is a function of a small module ``m`` (``m.w`` gain, ``m.b`` bias, both of size ``D``)
and of the input ``x`` of shape ``(…, D)``. Functions run in any dtype: those that mention float32
cast explicitly, as model code does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = 12
EPS = 1e-5
BOUND = 2.0**-6  # a bound that every dtype holds, and its square too
HALF = (torch.bfloat16, torch.float16)


class Affine(nn.Module):
    """Parameters for the spellings, and the modules some of them call."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(1 + 0.5 * torch.randn(D, generator=g))
        self.b = nn.Parameter(0.5 * torch.randn(D, generator=g))
        self.w2 = nn.Parameter(1 + 0.5 * torch.randn(4, D, generator=g))
        self.b2 = nn.Parameter(0.5 * torch.randn(4, D, generator=g))
        self.per_dim2 = nn.Parameter(1 + 0.5 * torch.randn(4, generator=g))
        self.s = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("eps", torch.tensor(EPS))
        self.ln = nn.LayerNorm(D, EPS)
        self.ln_plain = nn.LayerNorm(D, EPS, elementwise_affine=False)
        self.ln_no_bias = nn.LayerNorm(D, EPS, bias=False)
        self.rms = nn.RMSNorm(D, EPS)
        self.rms_none = nn.RMSNorm(D)
        self.to_modulation = nn.Linear(D, 2 * D)
        with torch.no_grad():
            for norm in (self.ln, self.ln_no_bias, self.rms, self.rms_none):
                norm.weight.copy_(self.w)
            self.ln.bias.copy_(self.b)
        self.to(dtype)


@dataclass(frozen=True)
class Spelling:
    """One row of the table.

    Attributes:
        f: ``f(m, x) -> Tensor``.
        kind: ``layer_norm`` or ``rms_norm``.
        dims, gain, bias, eps, floor: what the recognized node must say.
        casts: expected ``(stat, norm, out)`` dtypes for an input in a narrow dtype; ``"x"`` stands
            for that dtype, ``"f"`` for float32. ``None`` for a near miss in narrow dtypes.
        shape: shape of the input.
    """

    name: str
    f: Callable[[Affine, Tensor], Tensor]
    kind: str
    casts: str | None
    gain: bool = False
    bias: bool = False
    eps: float = EPS
    floor: bool = False
    dims: tuple[int, ...] = (-1,)
    shape: tuple[int, ...] = (3, 4, D)


SPELLINGS: list[Spelling] = []
MISSES: list[tuple[str, Callable[[Affine, Tensor], Tensor], str, tuple[int, ...]]] = []


def spelling(kind: str, casts: str | None, **facts: object) -> Callable:
    def add(f: Callable) -> Callable:
        SPELLINGS.append(Spelling(f.__name__, f, kind, casts, **facts))  # type: ignore[arg-type]
        return f

    return add


def miss(words: str, shape: tuple[int, ...] = (3, 4, D)) -> Callable:
    """``words`` must appear in the reason."""

    def add(f: Callable) -> Callable:
        MISSES.append((f.__name__, f, words, shape))
        return f

    return add


# ---------------------------------------------------------------------------------------------
# PyTorch's own


@spelling("layer_norm", "ffx", gain=True, bias=True)
def nn_layer_norm(m, x):
    return m.ln(x)


@spelling("layer_norm", "fxx")
def nn_layer_norm_without_affine(m, x):
    return m.ln_plain(x)


@spelling("layer_norm", "ffx", gain=True)
def nn_layer_norm_without_bias(m, x):
    return m.ln_no_bias(x)


@spelling("layer_norm", "ffx", gain=True, bias=True)
def functional_layer_norm(m, x):
    return F.layer_norm(x, (D,), m.w, m.b, EPS)


@spelling("layer_norm", "ffx", bias=True)
def functional_layer_norm_bias_alone(m, x):
    return F.layer_norm(x, (D,), None, m.b, EPS)


@spelling("layer_norm", "ffx", gain=True, bias=True, dims=(-2, -1))
def functional_layer_norm_two_dims(m, x):
    return F.layer_norm(x, (4, D), m.w2, m.b2, EPS)


@spelling("layer_norm", "ffx", gain=True, bias=True)
def native_layer_norm(m, x):
    return torch.native_layer_norm(x, (D,), m.w, m.b, EPS)[0]


@spelling("layer_norm", "fxx", gain=True, bias=True)
def functional_layer_norm_then_affine(m, x):
    return F.layer_norm(x, (D,), eps=EPS) * m.w + m.b


@spelling("layer_norm", "ffx", gain=True, bias=True)
def float32_layer_norm_of_narrow_input(m, x):
    return F.layer_norm(x.float(), (D,), m.w.float(), m.b.float(), EPS).type_as(x)


@spelling("rms_norm", "ffx", gain=True)
def nn_rms_norm(m, x):
    return m.rms(x)


@spelling("rms_norm", "ffx", gain=True, eps=torch.finfo(torch.float32).eps)
def nn_rms_norm_default_eps(m, x):
    return m.rms_none(x)


@spelling("rms_norm", "ffx", gain=True, dims=(-2, -1))
def functional_rms_norm_two_dims(m, x):
    return F.rms_norm(x, (4, D), m.w2, EPS)


@spelling("rms_norm", "fxx", gain=True)
def functional_rms_norm_one_plus_w(m, x):
    return F.rms_norm(x, (D,), eps=EPS) * (1 + m.w)


# ---------------------------------------------------------------------------------------------
# RMSNorm by hand


@spelling("rms_norm", "xxx", gain=True)
def rms_plain(m, x):
    return m.w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


@spelling("rms_norm", "fxx", gain=True)
def rms_llama(m, x):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return m.w * h.to(x.dtype)


@spelling("rms_norm", "ffx", gain=True)
def rms_gain_before_the_down_cast(m, x):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (m.w * h).to(x.dtype)


@spelling("rms_norm", "ffx", gain=True)
def rms_one_plus_w_in_float32(m, x):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + m.w.float())).type_as(x)


@spelling("rms_norm", "fxx", gain=True)
def rms_t5(m, x):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(variance + EPS)
    if m.w.dtype in HALF:
        h = h.to(m.w.dtype)
    return m.w * h


@spelling("rms_norm", "fff", gain=True)
def rms_stays_in_float32(m, x):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * m.w


@spelling("rms_norm", "xxx", gain=True)
def rms_x_times_x(m, x):
    return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + EPS) * m.w


@spelling("rms_norm", "xxx")
def rms_square_and_one_over_sqrt(m, x):
    return (1 / torch.sqrt(EPS + x.square().mean(-1, True))) * x


@spelling("rms_norm", "xxx")
def rms_divided_by_sqrt(m, x):
    return x / torch.sqrt(torch.mean(torch.pow(x, 2.0), -1, keepdim=True) + EPS)


@spelling("rms_norm", "xxx")
def rms_power_minus_half(m, x):
    return x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5)


@spelling("rms_norm", "xxx")
def rms_square_root_as_power(m, x):
    return x / (x**2).mean(-1, keepdim=True).add(EPS) ** 0.5


@spelling("rms_norm", "xxx")
def rms_reciprocal(m, x):
    return x * (x.square().mean(-1, keepdim=True) + EPS).sqrt().reciprocal()


@spelling("rms_norm", "xxx")
def rms_sum_over_d(m, x):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS)


@spelling("rms_norm", "xxx")
def rms_sum_times_one_over_d(m, x):
    return x * torch.rsqrt((1 / D) * x.pow(2).sum(-1, keepdim=True) + EPS)


@spelling("rms_norm", "xxx")
def rms_squares_divided_before_the_sum(m, x):
    return x * torch.rsqrt((x.pow(2) / D).sum(-1, keepdim=True) + EPS)


@spelling("rms_norm", "fxx")
def rms_overflow_guard_inside_the_square(m, x):
    return x * torch.rsqrt((x / math.sqrt(D)).pow(2).sum(-1, keepdim=True) + EPS)


@spelling("rms_norm", "fxx", gain=True)
def rms_of_a_tensor_times_a_constant(m, x):
    x = 0.25 * x
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return m.w * h.to(x.dtype) + x


@spelling("rms_norm", "xxx", eps=EPS / D)
def rms_sqrt_d_over_root_of_sum(m, x):
    return x * (math.sqrt(D) / (x.pow(2).sum(-1, keepdim=True) + EPS).sqrt())


@spelling("rms_norm", "fxx", eps=0.0)
def rms_vector_norm_over_sqrt_d(m, x):
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) / D**0.5)


@spelling("rms_norm", "fxx", gain=True, eps=0.0)
def rms_norm_times_d_to_minus_half(m, x):
    return m.w * (x / (x.norm(2, dim=-1, keepdim=True) * D**-0.5))


@spelling("rms_norm", "fxx", eps=0.0)
def rms_scale_after_l2(m, x):
    return math.sqrt(D) * (x / torch.linalg.norm(x, dim=-1, keepdim=True))


@spelling("rms_norm", "fxx")
def rms_norm_squared(m, x):
    return x * torch.rsqrt(x.norm(dim=-1, keepdim=True) ** 2 / D + EPS)


@spelling("rms_norm", "fxx")
def rms_vecdot(m, x):
    return x * torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) / D + EPS)


@spelling("rms_norm", "xxx")
def rms_unsqueezed(m, x):
    r = torch.rsqrt(x.pow(2).mean(-1) + EPS)
    return x * r[..., None]


@spelling("rms_norm", "xxx")
def rms_expanded(m, x):
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return x * r.expand_as(x)


@spelling("rms_norm", "xxx")
def rms_constant_eps_tensor(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + torch.tensor(EPS, dtype=torch.float64))


@spelling("rms_norm", "xxx")
def rms_eps_in_two_parts(m, x):
    return x * torch.rsqrt(0.25 * EPS + x.pow(2).mean(-1, keepdim=True) + 0.75 * EPS)


@spelling("rms_norm", "xxx")
def rms_alpha_of_add(m, x):
    return x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), EPS / 2, alpha=2))


@spelling("rms_norm", "xxx")
def rms_harmless_clamp(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=0) + EPS)


@spelling("rms_norm", "xxx")
def rms_harmless_clamp_of_rstd(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS).clamp_min(0)


@spelling("rms_norm", "xxx", floor=True, eps=BOUND)
def rms_clamped_mean_square(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp_min(BOUND))


@spelling("rms_norm", "xxx", floor=True, eps=BOUND**2)
def rms_maximum_of_root(m, x):
    r = x.pow(2).mean(-1, keepdim=True).sqrt()
    return x / torch.maximum(r, torch.tensor(BOUND, dtype=x.dtype))


@spelling("rms_norm", "fxx", gain=True, floor=True, eps=BOUND**2 / D)
def rms_functional_normalize(m, x):
    return F.normalize(x, dim=-1, eps=BOUND) * D**0.5 * m.w


@spelling("rms_norm", "fxx", gain=True, floor=True, eps=BOUND**2 / D)
def rms_functional_normalize_gain_first(m, x):
    return m.w * F.normalize(x, dim=-1, eps=BOUND) * math.sqrt(x.shape[-1])


@spelling("rms_norm", "ffx", gain=True, floor=True, eps=1e-24 / D)
def rms_functional_normalize_in_float32(m, x):
    return (F.normalize(x.float(), dim=-1) * D**0.5 * m.w.float()).to(x.dtype)


@spelling("rms_norm", "fxx", floor=True, eps=BOUND**2 / 4, dims=(-2,), shape=(3, 4, D))
def rms_functional_normalize_of_channels(m, x):
    return F.normalize(x, dim=1, eps=BOUND) * 2


@spelling("rms_norm", "fxx", gain=True)
def rms_gain_cast_like_the_input(m, x):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return h.type_as(x) * m.w.type_as(x).expand_as(x)


@spelling("rms_norm", "fxx", gain=True)
def rms_through_transparent_ops(m, x):
    h = x.float().contiguous()
    r = torch.rsqrt(h.clone().pow(2).mean(-1, keepdim=True) + EPS)
    return m.w * (h * r).to(x.dtype).contiguous()


@spelling("rms_norm", "xxx", gain=True)
def rms_scalar_gain(m, x):
    return m.s * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


@spelling("rms_norm", "xxx", gain=True)
def rms_gain_with_leading_ones(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * m.w[None, None]


@spelling("rms_norm", "xxx", gain=True)
def rms_gain_per_head(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * m.w2


@spelling("rms_norm", "xxx", gain=True, bias=True)
def rms_with_bias(m, x):
    return m.b + m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


@spelling("rms_norm", "ffx", gain=True)
def rms_gain_on_the_inverse_root(m, x):
    h = x.float()
    inverse = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * m.w.float()
    return (h * inverse).to(x.dtype)


@spelling("rms_norm", "xxx")
def rms_inner_dim(m, x):
    return x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + EPS)


SPELLINGS[-1] = Spelling(**{**SPELLINGS[-1].__dict__, "dims": (-2,), "shape": (2, 3, 4, D)})


@spelling("rms_norm", "xxx", dims=(-3, -2, -1))
def rms_over_everything(m, x):
    return x * torch.rsqrt(x.pow(2).mean() + EPS)


@spelling("rms_norm", "xxx", dims=(-3,))
def rms_over_the_first_dim_unkept(m, x):
    return x * torch.rsqrt(x.pow(2).mean(0) + EPS)


@spelling("rms_norm", "xxx")
def rms_of_a_slice_taken_twice(m, x):
    return x[..., :8] * torch.rsqrt(x[..., :8].pow(2).mean(-1, keepdim=True) + EPS)


# ---------------------------------------------------------------------------------------------
# LayerNorm by hand


@spelling("layer_norm", "ffx", gain=True)
def ln_cohere(m, x):
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + EPS)
    return (m.w.to(torch.float32) * h).to(x.dtype)


@spelling("layer_norm", "xxx", gain=True, bias=True)
def ln_mean_and_square(m, x):
    c = x - x.mean(-1, keepdim=True)
    return c / torch.sqrt((c * c).mean(-1, keepdim=True) + EPS) * m.w + m.b


@spelling("layer_norm", "fxx", gain=True, bias=True)
def ln_biased_var(m, x):
    mean = x.mean(-1, keepdim=True)
    var = x.var(-1, keepdim=True, unbiased=False)
    return m.b + (x - mean) / (var + EPS).sqrt() * m.w


@spelling("layer_norm", "fxx")
def ln_var_mean(m, x):
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + EPS)


@spelling("layer_norm", "fxx")
def ln_std_squared(m, x):
    std = x.std(-1, unbiased=False, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(std**2 + EPS)


@spelling("layer_norm", "fxx", eps=0.0)
def ln_std_without_eps(m, x):
    std, mean = torch.std_mean(x, -1, unbiased=False, keepdim=True)
    return (x - mean) / std


@spelling("layer_norm", "xxx")
def ln_sum_over_d(m, x):
    c = torch.sub(x, x.sum(-1, keepdim=True) / D)
    return c * torch.rsqrt(c.square().sum(-1, keepdim=True) / D + EPS)


@spelling("layer_norm", "xxx")
def ln_variance_of_mean_minus_x(m, x):
    u = x.mean(-1, keepdim=True)
    return (x - u) * torch.rsqrt((u - x).pow(2).mean(-1, keepdim=True) + EPS)


@spelling("layer_norm", "xxx")
def ln_unsqueezed(m, x):
    c = x - x.mean(-1).unsqueeze(-1)
    return c * torch.rsqrt(c.pow(2).mean(-1).unsqueeze(-1) + EPS)


@spelling("layer_norm", "ffx", gain=True, bias=True)
def ln_addcmul_in_float32(m, x):
    h = x.float()
    y = (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, unbiased=False, keepdim=True) + EPS)
    return torch.addcmul(m.b.float(), y, m.w.float()).to(x.dtype)


@spelling("layer_norm", "ffx", gain=True, bias=True)
def ln_gain_on_the_inverse_root(m, x):
    h = x.float()
    mul = torch.rsqrt(h.var(-1, unbiased=False, keepdim=True) + EPS) * m.w.float()
    return ((h - h.mean(-1, keepdim=True)) * mul + m.b.float()).to(x.dtype)


@spelling("layer_norm", "xxx", gain=True, bias=True, dims=(-3,), shape=(2, D, 3, 3))
def ln_channels_first(m, x):
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    x = (x - u) / torch.sqrt(s + EPS)
    return m.w[:, None, None] * x + m.b[:, None, None]


@spelling("layer_norm", "ffx", gain=True, bias=True, shape=(2, D, 3, 3))
def ln_channels_first_permuted(m, x):
    return F.layer_norm(x.permute(0, 2, 3, 1), (D,), m.w, m.b, EPS).permute(0, 3, 1, 2)


@spelling("layer_norm", "xxx", dims=(-2, -1))
def ln_two_dims(m, x):
    c = x - x.mean((-2, -1), keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean((1, 2), keepdim=True) + EPS)


@spelling("layer_norm", "ffx", gain=True, bias=True)
def ln_modulated_by_activations(m, x):
    shift, scale = m.to_modulation(x[:, :1]).chunk(2, -1)
    return m.ln(x) * (1 + scale) + shift


@spelling("layer_norm", "fxx")
def ln_plain_modulated_by_activations(m, x):
    shift, scale = m.to_modulation(x[:, :1]).chunk(2, -1)
    return m.ln_plain(x) * (1 + scale) + shift


@spelling("layer_norm", "fxx")
def ln_factor_per_position_is_no_gain(m, x):
    return m.ln_plain(x) * m.per_dim2[:, None]


@spelling("layer_norm", "fxx")
def ln_position_table_is_no_bias(m, x):
    return m.ln_plain(x) + m.b2


@spelling("layer_norm", "fxx")
def ln_read_twice_keeps_its_gain_outside(m, x):
    y = m.ln_plain(x)
    return y * m.w + y.sin()


@spelling("rms_norm", "fxx", gain=True)
def rms_inverse_root_read_elsewhere(m, x):
    h = x.float()
    r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return m.w * (h * r).to(x.dtype) + r.to(x.dtype)


# ---------------------------------------------------------------------------------------------
# Almost norms


@miss("not inside")
def eps_outside_the_root(m, x):
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS)


@miss("not inside")
def eps_outside_the_norm(m, x):
    return m.w * x / (x.norm(dim=-1, keepdim=True) * D**-0.5 + EPS)


@miss("not inside")
def std_plus_eps(m, x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + EPS)


@miss("unbiased")
def unbiased_variance(m, x):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS)


@miss("unbiased")
def unbiased_std(m, x):
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


@miss("dims")
def wrong_axis(m, x):
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(c.pow(2).mean(-2, keepdim=True) + EPS)


@miss("dims")
def wrong_axis_of_var(m, x):
    return (x - x.mean(-2, keepdim=True)) * torch.rsqrt(
        x.var(-1, unbiased=False, keepdim=True) + EPS
    )


@miss("another dim", shape=(D, D))
def broadcast_along_the_wrong_axis(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1) + EPS)


@miss("clamped")
def clamped_variance(m, x):
    h = x - x.mean(-1, keepdim=True)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True).clamp_min(BOUND))


@miss("clamped")
def clamped_rstd(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)).clamp_min(EPS)


@miss("clamped")
def clamped_and_eps(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp_min(BOUND) + EPS)


@miss("clamped")
def eps_and_clamped(m, x):
    return x * torch.rsqrt((x.pow(2).mean(-1, keepdim=True) + EPS).clamp_min(BOUND))


@miss("clamped")
def clamped_from_above(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(BOUND, 10.0))


@miss("bound of the mean square")
def bound_that_underflows(m, x):
    return F.normalize(x.float(), dim=-1, eps=1e-30) * D**0.5


@miss("constant factor 0.957427")
def functional_normalize_over_another_size(m, x):
    return F.normalize(x, dim=-1) * (D - 1) ** 0.5


@miss("cancellation")
def mean_of_squares_minus_square_of_mean(m, x):
    mean = x.mean(-1, keepdim=True)
    var = (x * x).mean(-1, keepdim=True) - mean * mean
    return (x - mean) * torch.rsqrt(var + EPS)


@miss("tensor 'eps'")
def eps_is_a_buffer(m, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.eps)


@miss("x itself is scaled")
def not_centered(m, x):
    return x * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


@miss("mean square of x")
def centered_over_the_raw_mean_square(m, x):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


@miss("only a part")
def partial_statistic(m, x):
    return x * torch.rsqrt(x[..., :4].pow(2).mean(-1, keepdim=True) + EPS)


@miss("L2")
def l2_normalization(m, x):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)


@miss("L2")
def functional_normalize(m, x):
    return F.normalize(x, dim=-1)


@miss("constant factor")
def divided_by_d_minus_one(m, x):
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (D - 1) + EPS)


#: Not norms, not even nearly: neither a node nor a site may appear.
def softmax_like(m, x):
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


def other_tensors_root(m, x):
    y = m.to_modulation(x)
    return x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)


def cube(m, x):
    return x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS)


def mean_absolute(m, x):
    return x / (x.abs().mean(-1, keepdim=True) + EPS)


def statistic_without_gradient(m, x):
    return x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + EPS)


def dropped_before_the_statistic(m, x):
    return x * torch.rsqrt(F.dropout(x, 0.5).pow(2).mean(-1, keepdim=True) + EPS)


def inverse_variance(m, x):
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS)


NOT_NORMS = [
    softmax_like,
    other_tensors_root,
    cube,
    mean_absolute,
    statistic_without_gradient,
    dropped_before_the_statistic,
    inverse_variance,
]

#: Near misses in narrow dtypes only (in float32 the rounding in question does not exist).
#: name -> (function, words of the reason)
NARROW_MISSES: dict[str, tuple[Callable, str]] = {}


def narrow_miss(words: str) -> Callable:
    def add(f: Callable) -> Callable:
        NARROW_MISSES[f.__name__] = (f, words)
        return f

    return add


@narrow_miss("rounded")
def inverse_root_rounded_before_the_product(m, x):
    r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return x * r.to(x.dtype)


@narrow_miss("rounded")
def squares_rounded_before_the_mean(m, x):
    return x.float() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.float32) + EPS)


@narrow_miss("statistic")
def statistic_in_the_narrow_dtype(m, x):
    return x.float() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
