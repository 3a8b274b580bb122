"""Weight programs: what folding computes from parameters, kept apart from the model's own graph.

Passes emit expressions of weights (``W·diag(g)``, ``W − mean``) as ordinary nodes marked
``weight_program``. In training they stay inline, so that gradients reach the original parameters,
and are marked for recomputation. In inference :func:`split` moves them into a graph of their own,
which :class:`WeightCache` runs once and again whenever one of its parameters has changed.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from . import ir
from .linear import forget
from .warn import warn


def program_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Nodes of the weight program, with the weight expressions they are made of, in graph order."""
    wanted: set[fx.Node] = set()
    stack = [n for n in gm.graph.nodes if n.meta.get("weight_program")]
    while stack:
        n = stack.pop()
        if n in wanted or n.op != "call_function":
            continue
        wanted.add(n)
        stack.extend(n.all_input_nodes)
    return [n for n in gm.graph.nodes if n in wanted]


def keep_nonfinite(gm: fx.GraphModule, inputs: Sequence[Any] = ()) -> list[str]:
    """Take weights that hold Inf or NaN out of what passes may fold; returns their names.

    ``W (n + β)`` and ``W n + W β`` are the same only for finite numbers. Values are looked at once.

    Args:
        inputs: the tensors of the graph's placeholders, as far as weights are among them.
    """
    leaves: list[tuple[fx.Node, torch.Tensor]] = []
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False):
        leaves.append((node, value))
    for node in gm.graph.find_nodes(op="get_attr"):
        leaves.append((node, ir.attribute(gm, node.target)))
    found: dict[tuple, list[tuple[fx.Node, torch.Tensor]]] = {}
    for node, value in leaves:
        if ir.is_weight(node) and _readable(value):
            found.setdefault((value.device, value.dtype), []).append((node, value.detach()))
    names: list[str] = []
    for (device, _), group in found.items():
        with torch.no_grad(), _autocast_off({device.type}):
            sizes = torch._foreach_norm([v for _, v in group], float("inf"))
            finite = torch.isfinite(torch.stack(sizes)).tolist()
        for (node, _), fine in zip(group, finite, strict=True):
            if not fine:
                node.meta["kind"], node.meta["nonfinite"] = "input", True
                names.append(str(node.meta.get("fqn", node.name)))
    if names:
        forget(gm.graph)
    return names


def _readable(value: Any) -> bool:
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and value.layout is torch.strided
        and not value.is_meta
        and value.numel() > 0
    )


def mark_recompute(gm: fx.GraphModule) -> None:
    """Training: folded weights are cheap to recompute; nothing extra is saved for backward."""
    from torch.utils.checkpoint import CheckpointPolicy

    for node in program_nodes(gm):
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def lift(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """Turn ``get_attr`` weights into leading placeholders (a copy; ``gm`` is not changed).

    Returns:
        The lifted module (flat inputs: weights, then the graph's own placeholders) and the weights'
        qualified names in order. Attributes that are not tensors (sub-graphs) stay attributes.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    names: list[str] = []
    root = torch.nn.Module()
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor):
            new = graph.placeholder(f"weight_{len(names)}")
            new.meta = dict(node.meta)
            new.meta.setdefault("kind", "constant")
            names.append(node.target)
            env[node] = new
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].args = ()  # no defaults: every input is passed
    for node in gm.graph.nodes:
        if node in env:
            continue
        if node.op == "get_attr":
            value = gm.get_submodule(node.target)
            root.add_module(node.target, value)
        env[node] = graph.node_copy(node, lambda n: env[n])
    lifted = fx.GraphModule(root, graph)
    lifted.meta = dict(gm.meta)
    return lifted, names


class WeightProgram:
    """A pure function of weights, cut out of a graph.

    Attributes:
        module: ``module(*leaves) -> tuple of folded tensors``.
        leaves: indices into the main graph's original placeholders that feed it.
        bytes: size of the folded tensors.
    """

    def __init__(self, module: fx.GraphModule, leaves: list[int], size: int) -> None:
        self.module, self.leaves, self.bytes = module, leaves, size
        # by position, not by name: graphs that fold the same weights share the results
        place = {n: f"%{i}" for i, n in enumerate(module.graph.nodes)}
        text = "\n".join(
            f"{ir.dtype(n)} {tuple(ir.val(n).shape)}"
            if n.op == "placeholder"
            else f"{n.target} {fx.map_arg((n.args, n.kwargs), lambda m: place[m])}"
            for n in module.graph.nodes
        )
        for name, constant in sorted(module.named_buffers()):
            text += f"\n{name}: {constant.dtype} {constant.tolist()}"
        self.key = hashlib.sha256(text.encode()).hexdigest()


def split(gm: fx.GraphModule) -> WeightProgram | None:
    """Move the weight program of a lifted graph out; ``gm`` gains one placeholder per result.

    ``gm`` must have its weights as placeholders (:func:`lift`, or a Dynamo graph). The new
    placeholders follow the existing ones, in the order of the program's outputs.
    """
    nodes = program_nodes(gm)
    if not nodes:
        return None
    inside = set(nodes)
    outputs = [
        n
        for n in nodes
        if n.meta.get("weight_program")
        and ir.is_tensor(n)
        and any(u not in inside for u in n.users)
    ]
    if not outputs:
        return None
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    position = {n: i for i, n in enumerate(placeholders)}
    graph = fx.Graph()
    root = torch.nn.Module()
    env: dict[fx.Node, fx.Node] = {}
    leaves: list[int] = []
    used = [p for p in placeholders if any(u in inside for u in p.users)]
    for p in used:
        env[p] = graph.placeholder(p.name)
        env[p].meta = dict(p.meta)
        leaves.append(position[p])
    for n in nodes:
        for a in n.all_input_nodes:
            if a.op == "get_attr" and a not in env:
                name = a.target.replace(".", "_")
                root.register_buffer(name, ir.attribute(gm, a.target))
                env[a] = graph.get_attr(name)
                env[a].meta = dict(a.meta)
        env[n] = graph.node_copy(n, lambda m: env[m])
    graph.output(tuple(env[n] for n in outputs))
    module = fx.GraphModule(root, graph)
    last = placeholders[-1] if placeholders else None
    for i, n in enumerate(outputs):
        if last is None:
            first = next(iter(gm.graph.nodes))
            context = gm.graph.inserting_before(first)
        else:
            context = gm.graph.inserting_after(last)
        with context:
            new = gm.graph.placeholder(f"folded_{i}")
        new.meta = {k: n.meta[k] for k in ("val", "tensor_meta") if k in n.meta}
        new.meta["kind"], new.meta["fqn"] = "buffer", _reader_name(n, inside) or f"folded_{i}"
        last = new
        n.replace_all_uses_with(new, delete_user_cb=lambda u: u not in inside)
    ir.erase_dead(gm)
    size = sum(v.numel() * v.element_size() for v in (ir.val(n) for n in outputs))
    return WeightProgram(module, leaves, int(size))


def _reader_name(node: fx.Node, inside: set[fx.Node]) -> str | None:
    """The name the reader of a folded weight would give it: ``<module path>.<argument>``."""
    for user in node.users:
        if user in inside or not isinstance(user.target, torch._ops.OpOverload):
            continue
        path = ir.module_path(user)
        for arg, value in zip(user.target._schema.arguments, user.args, strict=False):
            if value is node and path:
                # matmul(x, other), mm(x, mat2) and addmm(input=bias, x, mat2)
                role = {"mat2": "weight", "other": "weight", "input": "bias", "self": "bias"}
                return f"{path}.{role.get(arg.name, arg.name)}"
    return None


_version = operator.attrgetter("_version")


class _Entry:
    """Folded tensors of one tuple of weights, and what those weights were."""

    def __init__(self, folded: tuple[torch.Tensor, ...], references: list[Any]) -> None:
        self.folded, self.references = folded, references
        self.tracked: list[int] | None = None
        self.versions: list[int] = []
        self.pointers: list[int] | None = None  # to be folded anew

    def stands(self, leaves: Sequence[torch.Tensor]) -> bool:
        tracked = leaves if self.tracked is None else [leaves[i] for i in self.tracked]
        return (
            list(map(_version, tracked)) == self.versions
            and list(map(torch.Tensor.data_ptr, leaves)) == self.pointers
        )


class WeightCache:
    """Runs a weight program once and again when one of its weights has changed.

    One compiled graph may serve any number of models (the blocks of one, compiled one by one), so
    there are results for every tuple of weights, which go when one of those weights goes.

    A change is noticed by tensor identity, storage address and version counter: in-place updates
    under autograd's eyes, ``load_state_dict``, ``.to()`` and re-assignment all count, and so does the
    step of an optimizer, because fused ones count no version. Writing through ``p.data`` and writing
    to inference tensors leaves no trace: call :meth:`refresh` (or ``normfuse.refresh()``) after those.

    Results keep their addresses across refreshes when shapes allow, as CUDA graphs require.

    Args:
        limit: bytes that all results together may take. Beyond it, the latest makes room.
    """

    def __init__(self, program: WeightProgram, limit: float = math.inf) -> None:
        self.program, self.limit = program, limit
        self._lock = threading.Lock()
        self._entries: dict[tuple[int, ...], _Entry] = {}
        self._warned = False
        _live.add(self)
        _watch_optimizers()

    def __call__(self, leaves: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Folded tensors for ``leaves`` (in the order of ``program.leaves``)."""
        entry = self._entries.get(tuple(map(id, leaves)))
        if entry is not None and entry.stands(leaves):
            return entry.folded
        return self._run(leaves)

    def refresh(self, ids: set[int] | None = None) -> None:
        """Fold anew at the next call (``ids``: only what a tensor with one of these went into)."""
        with self._lock:
            for key in list(self._entries):
                entry = self._entries.get(key)  # weights may go at any time
                if entry is not None and (ids is None or not ids.isdisjoint(key)):
                    entry.pointers = None

    @property
    def bytes(self) -> int:
        return self.program.bytes * len(self._entries)

    def _run(self, leaves: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with self._lock, torch.no_grad():
            tracked = [i for i, t in enumerate(leaves) if not t.is_inference()]
            versions = [leaves[i]._version for i in tracked]
            device_types = {t.device.type for t in leaves}
            with _autocast_off(device_types):
                fresh = self.program.module(*leaves)
            entry = self._entries.get(tuple(map(id, leaves)))
            if entry is not None and all(
                a.shape == b.shape
                and a.dtype == b.dtype
                and a.device == b.device
                and a.stride() == b.stride()
                and not a.is_inference()
                for a, b in zip(entry.folded, fresh, strict=True)
            ):
                for a, b in zip(entry.folded, fresh, strict=True):
                    a.copy_(b)
            else:
                # results must not share storage with a weight: it may be written in place
                owned = {t.untyped_storage().data_ptr() for t in leaves}
                entry = self._add(
                    leaves,
                    tuple(
                        t.clone() if t.untyped_storage().data_ptr() in owned else t.detach()
                        for t in fresh
                    ),
                )
            entry.tracked = tracked if len(tracked) < len(leaves) else None
            entry.versions = versions
            entry.pointers = list(map(torch.Tensor.data_ptr, leaves))
            return entry.folded

    def _add(self, leaves: Sequence[torch.Tensor], folded: tuple[torch.Tensor, ...]) -> _Entry:
        key = tuple(map(id, leaves))
        self._entries.pop(key, None)
        while self._entries and self.bytes + self.program.bytes > self.limit:
            self._entries.popitem()
            self._warn()
        cache = weakref.ref(self)  # a cycle would keep the results until it is collected

        def gone(_: Any) -> None:
            if (living := cache()) is not None:
                living._entries.pop(key, None)

        entry = _Entry(folded, [weakref.ref(t, gone) for t in leaves])
        self._entries[key] = entry
        return entry

    def _warn(self) -> None:
        if self._warned:
            return
        self._warned = True
        warn(
            "one compiled graph serves several modules, and their folded weights take more than "
            f"max_folded_bytes ({self.limit / 2**20:.0f} MiB): some are folded at every call. Compile "
            "the whole model at once, raise the limit, or disable the passes that fold"
        )


_live: weakref.WeakSet[WeightCache] = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Fused steps write parameters without counting a version (compiled ones count it)."""
    if torch.compiler.is_compiling():
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for cache in list(_live):
        cache.refresh(stepped)


class _autocast_off:
    def __init__(self, device_types: set[str]) -> None:
        self._contexts = [torch.autocast(d, enabled=False) for d in device_types if d != "meta"]

    def __enter__(self) -> None:
        for c in self._contexts:
            c.__enter__()

    def __exit__(self, *exc: Any) -> None:
        for c in reversed(self._contexts):
            c.__exit__(*exc)


def refresh() -> int:
    """Recompute every folded weight at its next use; returns how many weight programs are live.

    Needed only after edits that PyTorch does not record: ``p.data.mul_(…)``, or any write to a
    tensor made under ``torch.inference_mode()``.
    """
    caches = list(_live)
    for cache in caches:
        cache.refresh()
    return len(caches)
