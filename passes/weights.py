"""Weight programs: what folding computes from parameters, kept apart from the model's own graph.

Passes emit expressions of weights (``W·diag(g)``, ``W − mean``) as ordinary nodes marked
``weight_program``. In training they stay inline, so that gradients reach the original parameters,
and are marked for recomputation. In inference :func:`split` moves them into a graph of their own,
which :class:`WeightCache` runs once and again whenever one of its parameters has changed.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from . import ir
from .linear import forget


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
        text = "\n".join(n.format_node() or "" for n in module.graph.nodes)
        for name, constant in sorted(module.named_buffers()):
            text += f"\n{name}: {constant.tolist()}"
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


class WeightCache:
    """Runs a weight program once and again when one of its weights has changed.

    A change is noticed by tensor identity, storage address and version counter: in-place updates
    under autograd's eyes, ``load_state_dict``, ``.to()`` and re-assignment all count, and so does the
    step of an optimizer, because fused ones count no version. Writing through ``p.data`` and writing
    to inference tensors leaves no trace: call :meth:`refresh` (or ``normfuse.refresh()``) after those.

    Results keep their addresses across refreshes when shapes allow, as CUDA graphs require.
    """

    def __init__(self, program: WeightProgram) -> None:
        self.program = program
        self._lock = threading.Lock()
        self._leaves: list[torch.Tensor] = []
        self._tracked: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._pointers: list[int] = []
        self._folded: tuple[torch.Tensor, ...] | None = None
        _live.add(self)
        _watch_optimizers()

    def __call__(self, leaves: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Folded tensors for ``leaves`` (in the order of ``program.leaves``)."""
        if (
            self._folded is not None
            and all(map(operator.is_, leaves, self._leaves))
            and list(map(_version, self._tracked)) == self._versions
            and list(map(torch.Tensor.data_ptr, leaves)) == self._pointers
        ):
            return self._folded
        return self._run(leaves)

    def refresh(self) -> None:
        """Forget the cached results; the next call recomputes them."""
        with self._lock:
            self._pointers = [-1]

    def reads(self, ids: set[int]) -> bool:
        """True if one of the weights it folded has its ``id`` among these."""
        return any(id(t) in ids for t in self._leaves)

    @property
    def bytes(self) -> int:
        return self.program.bytes if self._folded is not None else 0

    def _run(self, leaves: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with self._lock, torch.no_grad():
            versions_of = [t for t in leaves if not t.is_inference()]
            versions = list(map(_version, versions_of))
            device_types = {t.device.type for t in leaves}
            with _autocast_off(device_types):
                fresh = self.program.module(*leaves)
            old = self._folded
            if old is not None and all(
                a.shape == b.shape
                and a.dtype == b.dtype
                and a.device == b.device
                and a.stride() == b.stride()
                and not a.is_inference()
                for a, b in zip(old, fresh, strict=True)
            ):
                for a, b in zip(old, fresh, strict=True):
                    a.copy_(b)
                fresh = old
            else:
                # results must not share storage with a weight: it may be written in place
                owned = {t.untyped_storage().data_ptr() for t in leaves}
                fresh = tuple(
                    t.clone() if t.untyped_storage().data_ptr() in owned else t.detach()
                    for t in fresh
                )
            self._leaves, self._tracked, self._versions = list(leaves), versions_of, versions
            self._pointers = list(map(torch.Tensor.data_ptr, leaves))
            self._folded = fresh
            return fresh


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
        if cache.reads(stepped):
            cache.refresh()


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
