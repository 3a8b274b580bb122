"""``normfuse.rewrite`` and ``normfuse.explain``: a model in, an equivalent module and a report out."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..passes import ir
from ..passes.autocast import ambient
from ..passes.capture import capture, checked_args, set_attribute, transforming
from ..passes.errors import CaptureError, NormfuseError, NormfuseWarning, VerificationError
from ..passes.in_turn import in_turn
from ..passes.report import Report
from ..passes.warn import warn
from .bake import bake
from .likeness import resembling
from .reroute import Reroute
from .rewritten_graph import Graph
from .signature import layout
from .transform import Settings, make_settings, transform

#: How many input signatures one module keeps graphs for before it runs the original instead.
MAX_GRAPHS = 16


#: Attributes that a rewritten module has besides the original's.
_OWN = frozenset({"training", "forward", "report", "reports", "new_parameters"})


class RewrittenModule(nn.Module):
    """A model whose forward runs rewritten graphs.

    It has the original's submodules, parameters and buffers under their own names: ``state_dict``,
    optimizers, ``.to()``, ``requires_grad_`` and hooks on parameters work as before (forward hooks on
    submodules do not run: their code was captured). ``train()`` and ``eval()``, of the whole or of
    a submodule, each have their own graphs, captured at first use; so have new input signatures
    (another dtype, structure or a size the capture fixed). Replacing a submodule or untying a weight
    captures anew, and so does setting an attribute that is not a weight or a module: it is the
    original's. When a signature cannot be captured, the original code runs and a warning says why; a
    model with passes that extend or alter it raises, since its original is another function.

    Its class is one of its own that takes docstring and ``forward`` signature from the original's.

    Attributes:
        report: of the first graph. ``reports`` holds all of them.
    """

    def __new__(cls, source: nn.Module | None = None, settings: Settings | None = None) -> Any:
        if cls is RewrittenModule and source is not None:
            cls = resembling(cls, type(source), source.forward)
        return super().__new__(cls)

    def __init__(self, source: nn.Module, settings: Settings) -> None:
        super().__init__()
        # one set of dictionaries, so that whatever happens to either module happens to both
        self._parameters = source._parameters
        self._buffers = source._buffers
        self._modules = source._modules
        self._non_persistent_buffers_set = source._non_persistent_buffers_set
        self.training = source.training
        self.__dict__["_source"] = source
        self.__dict__["_settings"] = settings
        self.__dict__["_reroute"] = Reroute(source, self.forward)
        self.__dict__["_graphs"] = {}
        self.__dict__["_captured"] = []  # the same graphs, in a form Dynamo can trace through
        self.__dict__["_structure"] = ()  # the modules they were captured from
        #: names of parameters that passes added to the model
        self.new_parameters: list[str] = []
        self.reports: list[Report] = []
        self._uncapturable: set[str] = set()

    # -- nn.Module ------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> RewrittenModule:
        super().train(mode)
        self._source.training = mode
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            reroute = self.__dict__.get("_reroute")
            if reroute is None or name.startswith("__"):
                raise
            return reroute.method(name)  # config, generation helpers, user attributes

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name.startswith("_") or name in _OWN or name not in self.__dict__:
            return
        source = self._source
        del self.__dict__[name]
        if source.__dict__.get(name, _OWN) is not value:
            setattr(source, name, value)
            self._forget()

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or name not in self._source.__dict__:
            super().__delattr__(name)
        else:
            delattr(self._source, name)
            self._forget()

    def extra_repr(self) -> str:
        return f"rewritten from {type(self._source).__name__}, {len(self._graphs)} graphs"

    def __reduce__(self) -> tuple:  # its class is made on the way
        return RewrittenModule, (self._source, self._settings), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "training": self.training,
            "reports": self.reports,
            "new_parameters": self.new_parameters,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.training = state["training"]
        self.reports = state["reports"]
        self.new_parameters = state["new_parameters"]

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        new = RewrittenModule(copy.deepcopy(self._source, memo), copy.copy(self._settings))
        new.reports = copy.deepcopy(self.reports, memo)
        new.new_parameters = list(self.new_parameters)
        memo[id(self)] = new
        if layout(self)[0] == self._structure:
            copies = {id(g): g.moved(new._source) for gs in self._graphs.values() for g in gs}
            new._graphs.update({k: [copies[id(g)] for g in gs] for k, gs in self._graphs.items()})
            new._captured.extend((spec, copies[id(g)]) for spec, g in self._captured)
            new.__dict__["_structure"] = layout(new)[0]
        return new

    def adopt(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make parameters that a pass created the module's own, under their names."""
        for name, parameter in parameters.items():
            if name not in self.new_parameters:
                set_attribute(self._source, name, parameter)
                self.new_parameters.append(name)

    # -- running --------------------------------------------------------------------------------

    @property
    def report(self) -> Report:
        if not self.reports:
            raise NormfuseError("the module has not been captured yet: call it once")
        return self.reports[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat, in_spec = pytree.tree_flatten((args, kwargs))
        if torch.compiler.is_compiling():
            return self._forward_compiling(flat, in_spec, args, kwargs)
        replica = "_is_replica" in self.__dict__  # of data parallelism: modules of its own
        graph = self._graph_for(flat, in_spec, args, kwargs, replica)
        if graph is None:
            return self._reroute.original(args, kwargs)
        # inside a transform weights are no tensors to keep anything of
        inline = torch.is_grad_enabled() or transforming()
        if torch.is_grad_enabled() and graph.functions and self._differentiated(flat):
            self._give_up(f"the graph has no backward of {', '.join(graph.functions)}")
            return self._reroute.original(args, kwargs)
        flat_out = graph.run(self, flat, inline=inline, captured=not replica)
        return _write_back(args, kwargs, pytree.tree_unflatten(flat_out, graph.out_spec))

    def before_capture(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Have the graph for these inputs: nothing can be captured within a capture."""
        flat, in_spec = pytree.tree_flatten((args, kwargs))
        self._graph_for(flat, in_spec, args, kwargs)

    def _graph_for(
        self, flat: list, in_spec: Any, args: Any, kwargs: Any, replica: bool = False
    ) -> Graph | None:
        structure, modes = layout(self)
        if structure != self._structure and not replica:
            self._forget()
        for graph in self._graphs.get((modes, in_spec, ambient()), ()):
            if graph.matches(flat):
                return graph
        return self._capture(in_spec, args, kwargs)

    def _forward_compiling(self, flat: list, in_spec: Any, args: Any, kwargs: Any) -> Any:
        """Under ``torch.compile`` or ``torch.export``: the graph inline, weight program and all."""
        for graph_spec, graph in self._captured:
            if graph.functions and torch.is_grad_enabled():
                continue
            if graph_spec == in_spec and graph.traces(self, flat):
                return pytree.tree_unflatten(graph.run(self, flat, inline=True), graph.out_spec)
        if self._settings.beyond_exact:
            return self._forward_uncompiled(args, kwargs)
        if self._reroute.depth:  # inside one of the source's methods
            return type(self._source).forward(self._source, *args, **kwargs)
        return self._source(*args, **kwargs)

    @torch.compiler.disable(reason="this call of the rewritten module has not been captured yet")
    def _forward_uncompiled(self, args: Any, kwargs: Any) -> Any:
        """A break in Dynamo's graph: the call runs, is captured on the way and traced next time."""
        if torch.compiler.is_compiling():
            raise NormfuseError(
                "the rewritten module has not been captured for this call (its inputs, its mode): "
                "call it once as it is called here, then export it"
            )
        return self.forward(*args, **kwargs)

    def _capture(self, in_spec: pytree.TreeSpec, args: Any, kwargs: Any) -> Graph | None:
        try:
            if sum(map(len, self._graphs.values())) >= MAX_GRAPHS:
                raise CaptureError(
                    f"more than {MAX_GRAPHS} input signatures; sizes the capture fixed keep changing"
                )
            with self._reroute.aside():
                graph, report = build(self, self._source, args, kwargs, self._settings)
        except NormfuseError as error:
            self._give_up(str(error))
            return None
        self._compare(report)
        self.reports.append(report)
        self._add(in_spec, graph)
        return graph

    def _compare(self, report: Report) -> None:
        """Warn if this graph lacks an extension or alteration that the first one has."""
        names = self._settings.beyond_exact
        first = [pair for r in self.reports[:1] for pair in r.applied if pair[1] in names]
        lost = [pair for pair in first if pair not in set(report.applied)]
        if not lost:
            return
        why = {(site, name): f" ({reason})" for site, name, reason in report.refused}
        mode = "training" if self.training else "eval"
        warn(
            f"the graph of this call in {mode} mode lacks {len(lost)} of {len(first)} changes that "
            f"the first one has, such as {lost[0][1]} at {lost[0][0]}{why.get(lost[0], '')}: it is "
            "another function",
            NormfuseWarning,
        )

    def _give_up(self, text: str) -> None:
        if names := self._settings.beyond_exact:
            raise NormfuseError(
                f"{text}; the original code is no substitute: it runs without {', '.join(names)}"
            )
        if text not in self._uncapturable:
            self._uncapturable.add(text)
            warn(f"running the original code for this call: {text}")

    def _differentiated(self, flat: Sequence[Any]) -> bool:
        tensors = (*self.parameters(), *(x for x in flat if isinstance(x, torch.Tensor)))
        return any(t.requires_grad for t in tensors)

    def _forget(self) -> None:
        """Capture anew from now on."""
        self._graphs.clear()
        self._captured.clear()

    def _add(self, in_spec: pytree.TreeSpec, graph: Graph) -> None:
        # after the capture: passes may have added modules
        self.__dict__["_structure"], modes = layout(self)
        self._graphs.setdefault((modes, in_spec, ambient()), []).append(graph)
        self._captured.append((in_spec, graph))


def _write_back(args: Any, kwargs: Any, out: Any) -> Any:
    """Eager code updates a cache object passed in and returns it; a graph returns a new one.

    For each mutable custom container among the inputs with exactly one output of its class, the
    caller's object takes over the new state and is what the caller gets back.
    """
    inputs = [v for v in (*args, *kwargs.values()) if _is_cache(v)]
    if not inputs:
        return out
    leaves, spec = pytree.tree_flatten(out, is_leaf=_is_cache)
    for given in inputs:
        matches = [i for i, o in enumerate(leaves) if type(o) is type(given)]
        if len(matches) == 1:
            given.__dict__.update(leaves[matches[0]].__dict__)
            leaves[matches[0]] = given
    return pytree.tree_unflatten(leaves, spec)


def _is_cache(value: Any) -> bool:
    """Registered pytree classes that hold mutable state (``transformers`` cache objects)."""
    return type(value) in pytree.SUPPORTED_NODES and type(value).__name__.endswith("Cache")


# ---------------------------------------------------------------------------------------------


@in_turn
def build(
    owner: RewrittenModule,
    source: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    settings: Settings,
) -> tuple[Graph, Report]:
    """Capture ``source`` as it is now (train or eval, grad mode, autocast) and rewrite the graph."""
    start = time.perf_counter()
    gm = capture(
        source, tuple(args), dict(kwargs), dynamic=settings.dynamic, remember=settings.verify
    )
    for name in owner.new_parameters:  # an earlier graph's additions are this one's too
        set_attribute(gm, name, ir.attribute(source, name))
    flat = pytree.tree_leaves((tuple(args), dict(kwargs)))
    report, _ = transform(gm, flat, settings, training=source.training)
    owner.adopt(gm.meta.get("new_parameters", {}))
    graph = Graph(gm, owner, source)
    if not torch.is_grad_enabled():
        cache = graph.prepare_inference()
        report.weight_bytes = cache.program.bytes if cache is not None else 0
    report.seconds = time.perf_counter() - start
    return graph, report


def rewrite(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    passes: str | Iterable[Any] = "exact",
    verify: bool = True,
    *,
    policy: str | None = None,
    disable: Iterable[str] = (),
    weights: str = "live",
    dynamic: bool = True,
    strict: bool = False,
    fuel: int | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, Report]:
    """Rewrite a model's norms; the original is not touched.

    Args:
        model: any module that ``torch.export`` can capture.
        args, kwargs: example inputs, as the user would call it.
        passes: a preset name or a list of passes (instances, classes, registered names).
        verify: compare float64 results with the captured model's after norms were recognized and
            after every pass (a pass that changes them is undone), and the error in the working
            dtype with eager's own. The report says what failed.
        policy: ``"pays"`` (default of the preset ``"exact"``) lets the cost model decline,
            ``"always"`` (default otherwise) rewrites whatever is exact.
        disable: names of passes not to run.
        weights: ``"live"`` keeps the original parameters and folds them on the fly (once per
            change in inference, inline when gradients are on); ``"baked"`` stores folded weights
            instead: what quantizers and rotations want.
        dynamic: keep sizes symbolic where the model allows.
        strict: raise :class:`VerificationError` when verification fails.
        fuel: number of site rewrites allowed (bisection).
        inplace: share the original's parameters instead of copying them.

    Returns:
        ``(module, report)``.

    Raises:
        CaptureError: the model cannot be captured.
        NormfuseError: bad arguments.
        VerificationError: with ``strict``, when numbers disagree.
    """
    if not isinstance(model, nn.Module):
        raise NormfuseError(f"rewrite takes an nn.Module, got {type(model).__name__}")
    if weights not in ("live", "baked"):
        raise NormfuseError(f"weights must be 'live' or 'baked', got {weights!r}")
    settings = make_settings(passes, policy, disable, verify, dynamic, fuel)
    args, kwargs = checked_args(args), dict(kwargs or {})
    source = model if inplace else _copied(model)
    if weights == "baked":
        return _checked(bake(source, args, kwargs, settings), strict)
    module = RewrittenModule(source, settings)
    graph, report = build(module, source, args, kwargs, settings)
    module._add(pytree.tree_structure((args, kwargs)), graph)
    module.reports.append(report)
    return _checked((module, report), strict)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise NormfuseError(
            f"{type(model).__name__} cannot be copied ({error}); inplace=True shares its parameters"
        ) from error


def _checked(result: tuple[nn.Module, Report], strict: bool) -> tuple[nn.Module, Report]:
    if strict and result[1].failed_verification:
        raise VerificationError("\n".join(result[1].notes))
    return result


@in_turn
def explain(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    passes: str | Iterable[Any] = "exact",
    verify: bool = False,
    *,
    policy: str | None = None,
    disable: Iterable[str] = (),
    dynamic: bool = True,
) -> Report:
    """What :func:`rewrite` would do with ``model``, and what it would refuse and why.

    Nothing is copied or changed. Arguments as for :func:`rewrite`; put the model in ``eval()`` mode
    to ask about inference, in ``train()`` mode to ask about training. The report also carries a
    drawing of each residual stream. ``verify=True`` also runs the graphs, for the error figures.
    """
    if not isinstance(model, nn.Module):
        raise NormfuseError(f"explain takes an nn.Module, got {type(model).__name__}")
    settings = make_settings(passes, policy, disable, verify, dynamic)
    start = time.perf_counter()
    args, kwargs = checked_args(args), dict(kwargs or {})
    gm = capture(model, args, kwargs, dynamic=dynamic, remember=verify)
    drawings = _draw_streams(gm)
    flat = pytree.tree_leaves((args, kwargs))
    report, _ = transform(gm, flat, settings, training=model.training)
    report.streams = drawings
    report.seconds = time.perf_counter() - start
    return report


def _draw_streams(gm: fx.GraphModule) -> list[dict[str, str]]:
    from ..passes.residual import streams

    return [stream.drawing() for stream in streams(gm)]
