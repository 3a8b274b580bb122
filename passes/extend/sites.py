"""Which sites an extension applies to, and what all extensions of norms have in common."""

from __future__ import annotations

import fnmatch
import hashlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from .. import ir
from ..contract import Context, Pass, PassResult
from ..errors import NormfuseError, Refuse
from ..residual import Stream, streams
from .parameters import prune, refuse_in_backend

aten = torch.ops.aten

Selection = str | Iterable[str] | Callable[[str, fx.Node], bool]


def selector(sites: Selection) -> Callable[[str, fx.Node], bool] | None:
    """``None`` for ``"all"``; else a predicate from keys, glob patterns or the user's function."""
    if isinstance(sites, str):
        if sites == "all":
            return None
        sites = [sites]
    if callable(sites):
        return sites
    patterns = list(sites)
    if not all(isinstance(p, str) for p in patterns):
        raise NormfuseError(f"sites must be 'all', keys, patterns or a function, got {sites!r}")
    return lambda key, node: any(key == p or fnmatch.fnmatchcase(key, p) for p in patterns)


def fixed(size: Any, what: str, node: fx.Node) -> int:
    """A size out of :func:`ir.shape` that must not be a symbol."""
    if not isinstance(size, int):
        raise Refuse(f"{what} has no fixed size ({size})", node)
    return size


def width(node: fx.Node) -> int:
    """Size of the last dim, which must be fixed."""
    return fixed(ir.shape(node)[-1], "the feature dim", node)


def shared_refusals(node: fx.Node) -> None:
    """Norms that no extension handles."""
    args = ir.NormArgs(node)
    if list(args.dims) != [-1]:
        raise Refuse(
            f"the norm runs over dims {list(args.dims)}, the new parameters act on the last dim",
            node,
        )
    if ir.shape(node.args[0])[-1] == 0:
        raise Refuse("the norm has no features", node)


def result_of(node: fx.Node) -> fx.Node:
    """The normalized value: the node itself, or the first result of a fused residual norm."""
    if "residual" not in ir.NormArgs(node)._values:
        return node
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == 0:
            return user
    raise Refuse("nobody reads the normalized value", node)


class ExtendPass(Pass):
    """Base of passes that add trainable parameters and keep the function at insertion.

    Args:
        sites: ``"all"``, site keys or glob patterns (as printed in reports, or from
            ``Calibration.sites()``), or a function ``(key, node) -> bool``.
    """

    promise = "extend"

    def __init__(self, sites: Selection = "all", **options: Any) -> None:
        if not callable(sites) and not isinstance(sites, str):
            sites = list(sites)
        super().__init__(sites=sites, **options)
        self._selected = selector(sites)

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.options = state["options"]
        self._selected = selector(self.options["sites"])

    def uuid(self) -> str:
        sites = self.options["sites"]
        if not callable(sites):
            return super().uuid()
        code = getattr(sites, "__code__", None)
        body = b"" if code is None else code.co_code + repr(code.co_consts).encode()
        text = f"{getattr(sites, '__module__', '')}.{getattr(sites, '__qualname__', '')}"
        named = {**self.options, "sites": text + hashlib.sha256(body).hexdigest()[:16]}
        return f"{type(self).__module__}.{type(self).__qualname__}:{sorted(named.items())!r}"

    def run(self, gm: fx.GraphModule, context: Context) -> PassResult:
        result = PassResult()
        prune(gm)
        self.reused: list[str] = []
        for key, node, why_not in list(self.candidates(gm)):
            if self._selected is None:
                if why_not:
                    result.refused.append((key, why_not))
                    continue
            elif not self._selected(key, node):
                continue

            def plan(node: fx.Node = node) -> Callable[[], None]:
                refuse_in_backend(context)
                return self.plan(gm, node, context)

            self.attempt(context, result, key, plan)
        prune(gm)
        result.keeps_function = not self.reused
        return result

    def candidates(self, gm: fx.GraphModule) -> Iterable[tuple[str, fx.Node, str]]:
        """``(site key, node, reason not to take it under "all" or "")`` in graph order."""
        raise NotImplementedError

    def plan(self, gm: fx.GraphModule, node: fx.Node, context: Context) -> Callable[[], None]:
        """See :meth:`Pass.attempt`."""
        raise NotImplementedError


class NormExtension(ExtendPass):
    """Base of extensions of norms. ``"all"`` means the norms that read or write a residual stream
    (norms of queries and keys, or inside a branch, must be named)."""

    def candidates(self, gm: fx.GraphModule) -> Iterable[tuple[str, fx.Node, str]]:
        on_stream = _stream_norms(streams(gm))
        for node in ir.norm_nodes(gm):
            key = node.meta.get("site", node.name)
            why = self.extended(node)
            # a pre-affine cuts a norm off its stream; it was put there because the norm reads one
            if not why and node not in on_stream and not is_pre_affine(node.args[0]):
                why = "not a norm of a residual stream (name it in sites=)"
            yield key, node, why

    def extended(self, node: fx.Node) -> str:
        """Why the norm cannot be extended (again), or ``""``."""
        raise NotImplementedError


def is_pre_affine(node: Any) -> bool:
    """True for ``x · λ`` as InsertPreAffine emits it."""
    if not ir.is_call(node, aten.mul.Tensor) or not isinstance(node.args[1], fx.Node):
        return False
    scale = node.args[1]
    while ir.is_call(scale, aten.to):
        scale = scale.args[0]
    return str(scale.meta.get("fqn", "")).endswith("pre_affine")


def _stream_norms(found: Iterable[Stream]) -> set[fx.Node]:
    """Norms that read or write a residual stream."""
    out: set[fx.Node] = set()
    for stream in found:
        if not stream.adds:
            continue
        out |= {r.node for r in stream.norms}
        for writer in stream.writers:
            if writer.kind == "norm":
                source = writer.source
                out.add(source.args[0] if source.target is operator.getitem else source)
    return out
