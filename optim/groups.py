"""``param_groups``: which parameters are hidden matrices, and which are not, by what they do.

With example arguments the model is run once and every operator that touches a parameter is watched:
a table that is looked up, a matrix that multiplies, a gain that scales, and the one matrix whose
product is the model's output. Without arguments the module types say as much as they can. Names are
never consulted, except to report.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..passes.modes import evaluating

#: role → (what it is called in the printed table, goes to the matrix algorithm)
ROLES = {
    "hidden": ("hidden matrices", True),
    "filter": ("convolution filters, flattened", True),
    "stack": ("stacks of matrices, batched", True),
    "embedding": ("lookup tables", False),
    "input": ("input projections", False),
    "head": ("output head", False),
    "vector": ("gains, biases and other non-matrices", False),
}

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_scaled_mm", "_grouped_mm"}
_PRODUCTS |= {"mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "lstm", "gru", "rnn_tanh", "rnn_relu"}
_LOOKUPS = {"embedding", "embedding_bag", "index_select", "gather", "index", "_embedding_bag"}
#: Operators whose result is still the parameter: a cast (autocast) or a relayout.
_COPIES = {"clone", "_to_copy", "_unsafe_view", "_reshape_copy", "contiguous"}
#: … and these, when nothing else in them depends on the input: weights computed from a parameter of the
#: same shape (weight or spectral normalization, masks, a merged low-rank update) stand for it.
_REWEIGHTS = {"mul", "div", "add", "sub", "neg", "_weight_norm_interface", "_weight_norm", "where"}
_CONVOLUTIONS = {"convolution", "_convolution", "mkldnn_convolution"}


class _Watch(TorchDispatchMode):
    """Records which kind of operator uses each parameter, and whose product reaches a tensor."""

    def __init__(self, params: Mapping[int, str], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.params = params
        self.active = {id(t) for t in inputs}
        # which input a tensor is, but for its form, and the matrices that multiply an input
        self.raw = {id(t): i for i, t in enumerate(inputs)}
        self.readers: dict[int, set[str]] = {}
        self.uses: dict[str, set[str]] = {n: set() for n in params.values()}
        self.copies: dict[int, str] = {}
        self.sources: dict[int, frozenset[str | None]] = {}
        self._keep: list[Tensor] = []  # ids stay unique while tensors live

    def _owner(self, t: Tensor) -> str | None:
        root = t._base if t._is_view() and t._base is not None else t
        return self.params.get(id(root)) or self.copies.get(id(root))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket.__name__
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if op in _COPIES and len(tensors) == 1 and (owner := self._owner(tensors[0])):
            self.copies[id(outputs[0])] = owner
            self._keep.append(outputs[0])
            return out
        active = any(id(t) in self.active for t in tensors)
        stands_for = None
        if op in _REWEIGHTS and not active:
            same = {n for t in tensors if (n := self._owner(t)) and t.shape == outputs[0].shape}
            stands_for = same.pop() if len(same) == 1 else None
        kind = (
            "product"
            if op in _PRODUCTS
            else "lookup"
            if op in _LOOKUPS
            else "convolution"
            if op in _CONVOLUTIONS
            else "other"
        )
        from_params: list[str] = []
        above: set[frozenset[str | None]] = set()
        for i, t in enumerate(tensors):
            name = self._owner(t)
            if name is None:
                above.add(self.sources.get(id(t), frozenset()))
            elif name != stands_for and not all(self._owner(o) == name for o in outputs):
                # (a view is no use)
                bias = kind in ("product", "convolution") and t.ndim < 2 and i != 1
                self.uses[name].add("other" if bias else kind)
                if kind in ("product", "convolution") and not bias:
                    from_params.append(name)
        # whose output this is: one matrix's, several that are joined, or, of a sum, nobody's
        above = {frozenset(from_params)} if from_params else above - {frozenset()}
        tag: frozenset[str | None] = frozenset().union(*above)
        if len(from_params) > 1 or (len(above) > 1 and op not in ("cat", "stack")):
            tag = frozenset((None,))
        roots = {self.raw.get(id(t)) for t in tensors if id(t) in self.active}
        root = roots.pop() if len(roots) == 1 else None
        matrix = any(self._owner(t) and t.ndim > 1 for t in tensors)
        if root is not None and from_params:
            self.readers.setdefault(root, set()).add(from_params[0])
        for o in outputs:
            self.raw.pop(id(o), None)
            if root is not None and kind in ("other", "lookup") and not matrix:
                self.raw[id(o)] = root
            self.sources[id(o)] = tag
            self._keep.append(o)
            if active:
                self.active.add(id(o))
        if stands_for is not None:
            self.copies[id(outputs[0])] = stands_for
        return out


@contextlib.contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and back in its own; attention written out, not one operator that
    hides its products and has no forward-mode derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _observe(
    model: nn.Module, params: Mapping[int, str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, set[str]], set[str], set[str]]:
    """``(uses by name, heads, products fed by a raw input)``. Several heads: the output is joined from
    theirs. An input that several matrices multiply (queries, keys, values) is a hidden stream."""
    inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    with observing(model), torch.no_grad(), _Watch(params, inputs) as watch:
        out = model(*args, **kwargs)
    leaves = [t for t in tree_flatten(_plain(out))[0] if isinstance(t, Tensor)]
    # caches and attention maps also come back; the head feeds the first output and the logits
    tags = {watch.sources.get(id(t), frozenset()) for t in leaves[:2]} - {frozenset()}
    sources = tags.pop() if len(tags) == 1 else frozenset()
    heads = {n for n in sources if n is not None and None not in sources}
    first = {n for names in watch.readers.values() if len(names) == 1 for n in names}
    return watch.uses, heads, first


def _plain(out: Any) -> Any:
    if hasattr(out, "logits") and isinstance(out.logits, Tensor):
        return [out.logits]
    if isinstance(out, Mapping):
        return [out["logits"]] if "logits" in out else list(out.values())
    return out


_TABLES = (nn.Embedding, nn.EmbeddingBag)


def _role_by_use(p: Tensor, uses: set[str], module: nn.Module) -> str:
    # (a table of relative positions is multiplied, as activations are)
    if "lookup" in uses or isinstance(module, _TABLES):
        return "embedding"
    if p.ndim < 2:
        return "vector"
    if "convolution" in uses:
        return _filter_role(p, module)
    if "product" in uses:
        return "hidden" if p.ndim == 2 else "stack"
    return "vector"  # added, multiplied or unused: positions, LayerScale tables, tokens


def _filter_role(p: Tensor, module: nn.Module) -> str:
    # one input channel per group: rows share nothing that could be orthogonal; one entry a row: gains
    depthwise = p.shape[1] == 1 and getattr(module, "groups", 1) > 1
    return "vector" if depthwise or p.numel() == p.shape[0] else "filter"


def _role_by_type(p: Tensor, module: nn.Module) -> str:
    if isinstance(module, _TABLES):
        return "embedding"
    if p.ndim < 2:
        return "vector"
    if isinstance(module, nn.modules.conv._ConvNd):
        return _filter_role(p, module)
    if p.ndim == 2:
        stacks = (q for q in module.parameters(recurse=False) if q.ndim == 3)
        if any(q.shape[0] == p.shape[0] and p.shape[1] in q.shape[1:] for q in stacks):
            return "vector"  # a bias for each matrix of a stack
        # a column or row that is no layer's weight scales something (weight normalization's gains)
        return "hidden" if isinstance(module, nn.Linear) or 1 not in p.shape else "vector"
    if p.ndim == 3 and 1 not in p.shape:
        return "stack"
    return "vector"


def _host(model: nn.Module, prefix: str, module: nn.Module, p: Tensor) -> nn.Module:
    """The layer whose weight is ``p``; that of a computed weight has it in a list of its own."""
    if not isinstance(module, ParametrizationList):
        return module
    sizes = [q.numel() for q in module.parameters(recurse=False)]
    if p.numel() < max(sizes):  # gains
        return module
    return model.get_submodule(prefix[: prefix.rindex("parametrizations")].rstrip("."))


def param_groups(
    model: nn.Module,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    split: Mapping[str, Any] | Callable[[str, Tensor], Any] | None = None,
    matrix: Mapping[str, Any] | None = None,
    other: Mapping[str, Any] | None = None,
    verbose: bool = True,
) -> list[dict[str, Any]]:
    """Groups for any member of the family: hidden matrices, and the rest for AdamW.

    Args:
        model: its trainable parameters are grouped; tied ones appear once.
        args, kwargs: example inputs. With them roles come from one run in eval mode; without, from
            module types, and the head is the linear tied to a lookup table, or the only one as wide as
            one, else the last linear.
        split: how fused matrices come apart: name pattern to a ``split`` entry (number of parts,
            sizes, or ``(dim, parts)``), or a function of name and parameter returning one or None.
        matrix: extra entries of the groups of matrices.
        other: extra entries of the AdamW groups (``lr``, ``betas``, ``weight_decay`` …).
        verbose: print what went where.

    Returns:
        Groups with named parameters; each has ``role``, and ``view`` or ``algorithm`` where needed.
    """
    owners: dict[int, tuple[str, Tensor, list[nn.Module]]] = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if isinstance(p, nn.parameter.UninitializedTensorMixin):
                raise ValueError(f"{full} has no shape yet: run the model once, then group it")
            entry = owners.setdefault(id(p), (full, p, []))
            entry[2].append(_host(model, prefix, module, p))
    owners = {k: v for k, v in owners.items() if v[1].requires_grad}
    names = {k: v[0] for k, v in owners.items()}

    roles: dict[str, str] = {}
    if args is not None or kwargs is not None:
        uses, heads, first = _observe(model, names, args or (), kwargs or {})
        for name, p, modules in owners.values():
            roles[name] = _role_by_use(p, uses[name], modules[0])
        for role, found in (("head", heads), ("input", first if len(roles) > 2 else ())):
            for name in found:
                if roles[name] in ("hidden", "filter"):
                    roles[name] = role
    else:
        for name, p, modules in owners.values():
            by_type = [_role_by_type(p, m) for m in modules]
            roles[name] = "embedding" if "embedding" in by_type else by_type[0]
        _guess_ends(owners, roles)

    buckets: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
    for name, p, _ in owners.values():
        parts = _split_of(split, name, p) if ROLES[roles[name]][1] else None
        buckets.setdefault((roles[name], repr(parts)), []).append((name, p))

    groups: list[dict[str, Any]] = []
    for role in ROLES:
        for (found, *_), members in buckets.items():
            if found != role:
                continue
            group: dict[str, Any] = {"params": members, "role": role}
            if ROLES[role][1]:
                group["view"] = {"filter": "flatten", "stack": "batch"}.get(role, "matrix")
                parts = _split_of(split, *members[0])
                if parts is not None:
                    group["split"] = parts
                group.update(matrix or {})
            else:
                group["algorithm"] = "adamw"
                if role == "vector":
                    group["weight_decay"] = 0.0
                group.update(other or {})
            groups.append(group)
    if verbose:
        print(describe(groups))
    return groups


def _guess_ends(
    owners: Mapping[int, tuple[str, Tensor, list[nn.Module]]], roles: dict[str, str]
) -> None:
    """Without a run: mark the head and, for convolutional models, the input layer."""
    tables = {p.shape[0] for n, p, _ in owners.values() if roles[n] == "embedding"}
    linears = [
        (n, p)
        for n, p, m in owners.values()
        if roles[n] == "hidden" and isinstance(m[0], nn.Linear)
    ]
    tied = any(
        roles[n] == "embedding" and any(isinstance(m, nn.Linear) for m in ms)
        for n, _, ms in owners.values()
    )
    if linears and not tied:
        # several linears as wide as a table: a table as wide as the model, of positions for instance
        widths = [p.shape[0] for _, p in linears]
        wide = [n for n, p in linears if p.shape[0] in tables and widths.count(p.shape[0]) == 1]
        roles[wide[-1] if wide else linears[-1][0]] = "head"
    filters = [n for n, _, _ in owners.values() if roles[n] == "filter"]
    if filters and not tables:
        roles[filters[0]] = "input"


def _split_of(split: Any, name: str, p: Tensor) -> Any:
    if split is None:
        return None
    if callable(split):
        return split(name, p)
    return next((v for k, v in split.items() if fnmatchcase(name, k)), None)


def describe(groups: Sequence[Mapping[str, Any]]) -> str:
    """One line per group: role, algorithm, number of tensors and entries, examples."""
    lines = []
    for g in groups:
        members = g["params"]
        size = sum(p.numel() for _, p in members)
        where = g.get("algorithm", "matrix")
        extra = f", split {g['split']}" if "split" in g else ""
        shown = ", ".join(n for n, _ in members[:2]) + (", …" if len(members) > 2 else "")
        what = ROLES[g["role"]][0] + extra
        lines.append(f"{where:>7}  {len(members):4d} tensors {size:12,d}  {what}: {shown}")
    return "\n".join(lines)
