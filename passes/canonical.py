"""Every spelling of a norm becomes one node of the vocabulary.

``normal_form.py`` says which nodes are norms; this file edits the graph: it replaces the end of each
chain by ``normfuse::layer_norm`` or ``normfuse::rms_norm``, names the sites and lists the near misses.
A part of a chain that somebody else reads too (a returned ``rstd``, say) stays in the graph for that
reader; the statistic is then computed twice, which is what eager's separate kernels cost anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from . import ir, normal_rules, normal_stats  # noqa: F401  (they fill the rule table)
from .normal_facts import Miss, Norm, is_cast, packet
from .normal_form import NormalForm
from .report import Site

aten = torch.ops.aten
nf = torch.ops.normfuse

#: Norms whose statistic runs over the batch or over groups of channels: recognized, not rewritten.
_OTHER_NORMS = {
    aten.batch_norm: "batch_norm",
    aten.native_batch_norm: "batch_norm",
    aten.cudnn_batch_norm: "batch_norm",
    aten.miopen_batch_norm: "batch_norm",
    aten._native_batch_norm_legit: "batch_norm",
    aten._native_batch_norm_legit_no_training: "batch_norm",
    aten._batch_norm_no_update: "batch_norm",
    aten._batch_norm_with_update: "batch_norm",
    aten.group_norm: "group_norm",
    aten.native_group_norm: "group_norm",
    aten.instance_norm: "instance_norm",
}


def canonicalize(gm: fx.GraphModule) -> list[Site]:
    """Rewrite ``gm`` (captured IR) in place so that every norm is a vocabulary node.

    The vocabulary nodes carry ``meta["site"]`` and ``meta["spelling"]``; so do batch, group and
    instance norms, which stay ATen nodes.

    Returns:
        Sites that no pass will rewrite as a layer or RMS norm: kinds ``batch_norm``, ``group_norm``,
        ``instance_norm``, and ``near_miss`` with the reason in ``refused``.
    """
    plain_casts(gm)
    ir.erase_dead(gm)
    form = NormalForm(gm).run()
    norms = [
        fact
        for node, fact in form.facts.items()
        if isinstance(fact, Norm) and node not in form.extended
    ]
    others = [n for n in gm.graph.nodes if ir.is_call(n, *_OTHER_NORMS) and "site" not in n.meta]
    # a rewritten module that is captured again brings vocabulary nodes along
    named = [n for n in ir.norm_nodes(gm) if "site" not in n.meta]
    keys = _keys(gm, norms, others, list(form.misses.values()), named)
    for node in named:
        node.meta["site"], node.meta["spelling"] = keys[node], f"normfuse.{_vocabulary(node)}"
    sites = [_other_site(n, keys[n]) for n in others]
    sites += [_miss_site(m, keys[m.node]) for m in form.misses.values()]
    moved: dict[fx.Node, fx.Node] = {}
    dirty: list[fx.Node] = []
    for norm in norms:
        new = _replace(gm.graph, norm, keys[norm.core], moved)
        if not _same_layout(new.meta["val"], norm.end.meta["val"]):
            dirty.append(new)
    ir.erase_dead(gm)
    settle(gm, dirty)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    at = {keys[n]: order.get(n, len(order)) for n in others}
    at.update((keys[m.node], order.get(m.node, len(order))) for m in form.misses.values())
    return sorted(sites, key=lambda s: at[s.key])


# ---------------------------------------------------------------------------------------------
# Casts


def plain_casts(gm: fx.GraphModule) -> None:
    """Spell casts one way and drop those that change nothing.

    ``type_as(a, b)`` and ``to(a, b)`` read only ``b``'s dtype: written with the dtype, a cast of a
    weight depends on weights alone. A cast to the dtype a tensor has returns the tensor itself.
    """
    for node in list(gm.graph.nodes):
        if not is_cast(node) or node.meta.get("mutated"):
            continue
        source = node.args[0]
        if source.meta.get("mutated") or node.target._schema.is_mutable:
            continue
        args = ir.bind(node)
        if args.get("copy") or args.get("memory_format") not in (None, torch.preserve_format):
            continue
        if args.get("layout") not in (None, torch.strided) or args.get("pin_memory"):
            continue
        if ir.dtype(source) == ir.dtype(node) and node.target is not aten._to_copy.default:
            ir.replace(node, source)
        elif node.target is not aten.to.dtype:
            node.target = aten.to.dtype
            node.args, node.kwargs = (source, ir.dtype(node)), {}


# ---------------------------------------------------------------------------------------------
# Replacement

_TARGETS = {"layer_norm": nf.layer_norm.default, "rms_norm": nf.rms_norm.default}


def _replace(graph: fx.Graph, norm: Norm, key: str, moved: dict[fx.Node, fx.Node]) -> fx.Node:
    end = norm.end
    x, gain, bias = (a and moved.get(a, a) for a in (norm.x, norm.gain, norm.bias))
    with graph.inserting_before(end):
        new = ir.emit(
            graph,
            _TARGETS[norm.kind],
            x,
            list(norm.dims),
            gain,
            bias,
            norm.eps,
            like=norm.core,
            **({"floor": True} if norm.floor else {}),
            stat_dtype=norm.stat_dtype,
            norm_dtype=norm.norm_dtype,
            out_dtype=norm.out_dtype,
        )
    new.meta["site"] = key
    new.meta["spelling"] = _spelling(norm)
    new.meta["replaced"] = end.name  # verification looks there when numbers disagree
    moved[end] = new
    end.replace_all_uses_with(new)
    return new


def _spelling(norm: Norm) -> str:
    if norm.native:
        owner = _owner(norm.core)
        text = owner if owner and owner.startswith("nn.") else norm.text
    else:
        text = norm.text
    return text


def _owner(node: fx.Node) -> str | None:
    """The class of the innermost module, written ``nn.LayerNorm`` for PyTorch's own."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    cls = list(stack.values())[-1][1]
    name = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
    prefix, _, last = name.rpartition(".")
    return f"nn.{last}" if prefix.startswith("torch.nn.") else last


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    return ir.same_shape(a.stride(), b.stride()) and a.storage_offset() is not None


_VIEWS = {aten.view.default: aten.reshape.default}


def settle(gm: fx.GraphModule, changed: Iterable[fx.Node]) -> None:
    """Recompute fake values downstream of nodes whose memory layout changed.

    A ``view`` that the new layout does not allow becomes a ``reshape``; before any other op that
    insists on a layout, the value is made contiguous as it was.
    """
    dirty = set(changed)
    if not dirty:
        return
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node in dirty:
            continue
        stale = [a for a in node.all_input_nodes if a in dirty]
        if not stale or "val" not in node.meta or not isinstance(node.meta["val"], torch.Tensor):
            if stale and isinstance(node.meta.get("val"), (list, tuple)):
                _recompute(gm, node, stale)
                dirty.add(node)
            continue
        old = node.meta["val"]
        _recompute(gm, node, stale)
        if not _same_layout(node.meta["val"], old):
            dirty.add(node)


def _recompute(gm: fx.GraphModule, node: fx.Node, stale: list[fx.Node]) -> None:
    if not isinstance(node.target, torch._ops.OpOverload) and "getitem" not in str(node.target):
        return  # a higher-order op keeps what its body was traced with
    try:
        ir.set_val(node)
        return
    except Exception:
        if node.target in _VIEWS:
            node.target = _VIEWS[node.target]
            ir.set_val(node)
            return
    for a in stale:
        if not isinstance(a.meta.get("val"), torch.Tensor):
            continue
        with gm.graph.inserting_before(node):
            flat = ir.emit(gm.graph, aten.contiguous.default, a, like=node)
        node.replace_input_with(a, flat)
    ir.set_val(node)


# ---------------------------------------------------------------------------------------------
# Sites


def _call_index(node: fx.Node) -> tuple[str, str]:
    """Module path and the name of this call of it (tracing numbers repeated calls)."""
    stack = node.meta.get("nn_module_stack")
    return ir.module_path(node), str(list(stack)[-1]) if stack else ""


def _keys(
    gm: fx.GraphModule,
    norms: list[Norm],
    others: list[fx.Node],
    misses: list[Miss],
    named: list[fx.Node],
) -> dict[fx.Node, str]:
    """A unique key for each site, by its node: the module's path where the module is the norm."""
    sites: list[tuple[fx.Node, str]] = [(n.core, n.kind) for n in norms]
    sites += [(n, _OTHER_NORMS[packet(n)]) for n in others]
    sites += [(m.node, "near_miss") for m in misses]
    sites += [(n, _vocabulary(n)) for n in named]
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    sites.sort(key=lambda s: order[s[0]])
    per_call = Counter(_call_index(node) for node, _ in sites)
    parents: set[str] = set()
    for node in gm.graph.nodes:
        path = ir.module_path(node)
        while "." in path:
            path = path.rpartition(".")[0]
            if path in parents:
                break
            parents.add(path)
    used: set[str] = set()
    numbered: Counter[tuple[str, str]] = Counter()
    keys: dict[fx.Node, str] = {}
    taken: Counter[str] = Counter()
    for node, kind in sites:
        path = ir.module_path(node)
        own = bool(path) and path not in parents and per_call[_call_index(node)] == 1
        if own:
            key = path if not taken[path] else f"{path}#{taken[path]}"
            taken[path] += 1
        else:
            n = numbered[path, kind]
            numbered[path, kind] += 1
            key = f"{path}.{kind}_{n}" if path else f"{kind}_{n}"
        while key in used:  # a module may be called like one of our names
            key += "'"
        used.add(key)
        keys[node] = key
    return keys


def _vocabulary(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[1]  # type: ignore[union-attr]


def _facts(node: fx.Node, x: fx.Node, spelling: str) -> dict[str, Any]:
    return {
        "module": ir.module_path(node),
        "spelling": spelling,
        "where": ir.where(node),
        "shape": "×".join(str(s) for s in ir.shape(x)),
        "dtype": str(ir.dtype(x)).removeprefix("torch."),
    }


def _other_site(node: fx.Node, key: str) -> Site:
    kind = _OTHER_NORMS[packet(node)]
    x: Any = node.args[0]
    spelling = _owner(node) or ""
    if not spelling.startswith("nn."):
        spelling = f"F.{kind}"
    node.meta["site"], node.meta["spelling"] = key, spelling
    return Site(key=key, kind=kind, **_facts(node, x, spelling))


def _miss_site(miss: Miss, key: str) -> Site:
    reason = f"{miss.reason} [{ir.describe(miss.node)}]"
    return Site(
        key=key,
        kind="near_miss",
        refused=[("canonicalize", reason)],
        **_facts(miss.node, miss.x, miss.text),
    )
