"""From a model, an exported program, a Dynamo graph or any ``fx.GraphModule`` to the IR.

``capture`` is the public entry: it returns a canonicalized ``GraphModule`` that is called like the
model and whose parameters are the model's own. ``capture_fx`` traces a graph that already exists
(the ``torch.compile`` backend uses it).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import _trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from . import ir
from .autocast import Autocast, ambient, explicit_casts, make_explicit
from .called import called
from .einsum import einsum_to_linear
from .errors import CaptureError
from .functionalize import functionalize
from .in_turn import in_turn
from .inline import inline_regions
from .opaque import opaque_sites
from .paths import clean_path, user_frame
from .python_state import ChangesState, Watch, refuse_state
from .recorded import read_marks, recorded_checkpoints, recorded_functions
from .report import Site
from .snapshot import Snapshot
from .subgraphs import Region, Retrace

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------
# Public entry


@in_turn
def capture(
    model: Callable | torch.export.ExportedProgram | fx.GraphModule,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: bool = True,
    canonical: bool = True,
    remember: bool = False,
) -> fx.GraphModule:
    """Capture ``model`` as one pre-dispatch ATen graph with its norms recognized.

    Args:
        model: a module, a plain callable, an ``ExportedProgram`` or an ``fx.GraphModule``.
        args, kwargs: example inputs, as the user would call the model. Not needed for an exported
            program.
        dynamic: keep the tensor dims symbolic where the model allows it (of inputs with four or
            more dims, the first only).
        canonical: also rewrite every spelling of a norm into the vocabulary.
        remember: keep the graph as it was before that in ``gm.meta["captured"]``, and what the model
            gives when it is called in ``gm.meta["called"]`` (verification compares with both).

    Returns:
        A ``GraphModule`` called like the model (same signature, same output structure). Its
        parameters and buffers are the model's own objects, under their own names. Extra facts are
        in ``gm.meta["near_misses"]`` (sites that are almost norms).

    Raises:
        CaptureError: the model cannot be captured; says what and where.
    """
    args = checked_args(args)
    kwargs = dict(kwargs or {})
    if isinstance(model, torch.export.ExportedProgram):
        gm = from_exported(model)
    elif isinstance(model, nn.Module):
        # a module that captures itself when called (rewritten ones) cannot do so within a capture
        if (prepare := getattr(type(model), "before_capture", None)) is not None:
            prepare(model, args, kwargs)
        gm = from_exported(export(model, args, kwargs, dynamic=dynamic))
    elif callable(model):
        gm = from_exported(export(_FunctionModule(model), args, kwargs, dynamic=dynamic))
    else:
        raise CaptureError(
            f"expected a module, a callable, an ExportedProgram or a GraphModule, got {type(model)}"
        )
    finish(gm, canonical=canonical, autocast=ambient(), remember=remember)
    if remember and not isinstance(model, torch.export.ExportedProgram):
        module = model if isinstance(model, nn.Module) else _FunctionModule(model)
        gm.meta["called"] = called(module, args, kwargs)
    return gm


def finish(
    gm: fx.GraphModule,
    *,
    canonical: bool = True,
    autocast: tuple[Autocast, ...] = (),
    remember: bool = False,
) -> list[Site]:
    """Common tail of every capture: inline regions, make casts explicit, functionalize, recognize.

    Args:
        autocast: the autocast settings in force around the captured code. The graph's casts are
            explicit afterwards: it must run with autocast off.
        remember: keep a snapshot of the graph before recognition in ``gm.meta["captured"]``.
    """
    with explicit_casts():  # values are computed as the graph will run
        inline_regions(gm)
        _rename_provenance(gm)
        gm.meta["autocast"] = autocast
        make_explicit(gm, autocast)
        functionalize(gm)
        if remember:
            gm.meta["captured"] = Snapshot(gm.graph)
        einsum_to_linear(gm)
        sites: list[Site] = []
        if canonical:
            from .canonical import canonicalize

            sites = canonicalize(gm)
            gm.meta["near_misses"] = sites
        inside, gm.meta["notes"] = opaque_sites(gm)
        gm.meta["notes"] += gm.meta.get("state", [])
        if lost := gm.meta.get("functions"):
            gm.meta["notes"].append(
                f"the graph knows no backward of the autograd.Function {', '.join(lost)}: it is for "
                "inference; with gradients enabled the original code runs"
            )
        sites += inside
        ir.check(gm)
        gm.recompile()
    return sites


def checked_args(args: Any) -> tuple:
    """``args`` as a tuple; a bare tensor or string is a mistake worth a clear error."""
    if isinstance(args, torch.Tensor):
        raise CaptureError("args must be a tuple of the model's positional arguments, got a tensor")
    if not isinstance(args, Sequence) or isinstance(args, str):
        raise CaptureError(f"args must be a tuple of positional arguments, got {type(args)}")
    return tuple(args)


class _FunctionModule(nn.Module):
    """A plain function as a module, keeping its signature (``torch.export`` wants a module)."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function
        with contextlib.suppress(TypeError, ValueError):
            self.__signature__ = inspect.signature(function)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


# ---------------------------------------------------------------------------------------------
# torch.export

_UNSUPPORTED_LAYOUTS = "sparse, quantized, nested and meta tensors are not supported"


def transforming() -> bool:
    """True inside a transform of ``torch.func`` or a level of forward-mode AD."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _check_inputs(args: tuple, kwargs: dict[str, Any]) -> None:
    for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
        if not isinstance(leaf, torch.Tensor):
            continue
        name = pytree.keystr(path)
        if leaf.layout is not torch.strided or leaf.is_quantized or leaf.is_nested:
            raise CaptureError(f"input {name}: {_UNSUPPORTED_LAYOUTS} (layout {leaf.layout})")
        if leaf.is_meta:
            raise CaptureError(f"input {name} is a meta tensor: {_UNSUPPORTED_LAYOUTS}")


def _register_cache_pytrees() -> None:
    """Teach pytree the cache objects of ``transformers``, if that library is in use."""
    if "transformers" not in sys.modules:
        return
    try:
        from transformers import cache_utils
        from transformers.integrations import executorch
    except Exception:
        return
    register = getattr(executorch, "register_dynamic_cache_export_support", None)
    if register is not None:
        with contextlib.suppress(ValueError):  # registered already, by the user or by us
            register()
    pair = getattr(cache_utils, "EncoderDecoderCache", None)
    if pair is not None and pair not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            pair,
            lambda c: ([c.self_attention_cache, c.cross_attention_cache], None),
            lambda children, _: pair(*children),
            serialized_type_name=f"{pair.__module__}.{pair.__name__}",
        )


@in_turn
def export(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], *, dynamic: bool = True
) -> torch.export.ExportedProgram:
    """``torch.export`` with automatic dynamic dims, falling back to static ones and strict mode."""
    _check_inputs(args, kwargs)
    if transforming():
        raise CaptureError(
            f"{type(model).__name__} cannot be captured inside vmap, grad, jvp or another transform "
            "of torch.func; capture it outside, with inputs as it sees them inside"
        )
    _register_cache_pytrees()
    attempts: list[tuple[bool, bool]] = [(True, False)] if dynamic else []
    attempts += [(False, False), (False, True)]
    errors: list[str] = []
    branch = ""
    for use_dynamic, strict in attempts:
        try:
            return _traced(model, args, kwargs, use_dynamic, strict)
        except ChangesState as error:
            raise ChangesState(f"{type(model).__name__} could not be captured: {error}") from None
        except Exception as error:
            if isinstance(error, (TypeError, ValueError)) and not errors:
                _raise_if_call_fails(model, args, kwargs)
            branch = branch or _data_dependent(error)
            how = "dynamic" if use_dynamic else ("strict" if strict else "static")
            errors.append(f"{how}: {type(error).__name__}: {_first_lines(error)}{_place(error)}")
    name = type(model).__name__
    if branch:
        raise CaptureError(
            f"{name} could not be captured as one graph: its control flow or a size depends on the "
            f"values of a tensor{branch}. torch.where and torch.cond can be captured; "
            'torch.compile(model, backend="normfuse") breaks the graph there'
        )
    raise CaptureError(f"{name} could not be captured as one graph.\n  " + "\n  ".join(errors))


def _traced(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], dynamic: bool, strict: bool
) -> torch.export.ExportedProgram:
    """One trace, which leaves the model's Python state as it was."""
    watch = Watch(model)

    def trace() -> torch.export.ExportedProgram:
        shapes = _auto_dims(args, kwargs) if dynamic else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet())
            regions = stack.enter_context(recorded_checkpoints())
            # strict tracing keeps custom functions whole, as Dynamo does
            functions = [] if strict else stack.enter_context(recorded_functions())
            stack.enter_context(watch.tracing(hooked=not strict))
            stack.enter_context(_marks_kept(args, kwargs))
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
        program.graph_module.meta["regions"] = regions
        program.graph_module.meta["functions"] = functions
        return program

    try:
        program = trace()
        program.graph_module.meta["state"] = refuse_state(watch, program, trace)
        return program
    finally:
        watch.restore()


def _raise_if_call_fails(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """If the arguments do not even fit the model's signature, say that and nothing else."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__}.forward: {error}") from None


def _data_dependent(error: BaseException) -> str:
    """Where in the user's code a branch on a tensor's values ended the trace; ``""`` if none did."""
    return (_place(error) or " ") if isinstance(error, GuardOnDataDependentSymNode) else ""


def _place(error: BaseException) -> str:
    """`` at file:line`` of the model's code that was being traced, or ``""``."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = max((i for i, f in enumerate(frames) if f.filename == __file__), default=-1)
    where = user_frame("".join(traceback.format_list(frames[ours + 1 :])))
    return f" at {where}" if where and not where.startswith("torch/") else ""


def _first_lines(error: BaseException, n: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " | ".join(lines[:n])[:400]


def _auto_dims(args: tuple, kwargs: dict[str, Any]) -> torch.export.ShapesCollection:
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            # images and volumes: the batch varies; symbolic heights and widths make tracing crawl
            dims = range(1 if leaf.dim() >= 4 else leaf.dim())
            shapes[leaf] = {i: torch.export.Dim.AUTO for i in dims}
    return shapes


@contextlib.contextmanager
def _marks_kept(args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """``torch.export`` marks dims of the inputs as dynamic, and leaves the marks there if it fails."""
    spaces = [vars(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    marks = [{k: copy.copy(v) for k, v in s.items() if "_dynamo" in k} for s in spaces]
    try:
        yield
    finally:
        for space, kept in zip(spaces, marks, strict=True):
            for name in [k for k in space if "_dynamo" in k]:
                del space[name]
            space.update(kept)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, nor the graphs that ``torch.export`` prints when it fails: the error says it."""
    import logging
    import warnings

    loggers = [logging.getLogger("torch"), logging.getLogger(_trace.__name__)]
    levels = [logger.level for logger in loggers]
    loggers[0].setLevel(logging.ERROR)
    loggers[1].setLevel(logging.CRITICAL)
    _trace.print = lambda *_, **__: None  # type: ignore[attr-defined]  # hides the builtin there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        vars(_trace).pop("print", None)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def from_exported(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """An exported program as IR: weights become attributes under their names, called like the model."""
    verifier = getattr(program, "dialect", "TRAINING")
    if verifier not in ("TRAINING", "ATEN", ""):
        raise CaptureError(f"exported program of dialect {verifier!r} is not pre-dispatch ATen")
    module = program.module(check_guards=False)
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    persistent = set(module.state_dict(keep_vars=True))
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    leaves: dict[int, fx.Node] = {}
    in_names = iter(_input_names(program))
    mode = None
    for node in program.graph.nodes:
        v = node.meta.get("val")
        if isinstance(v, torch._subclasses.FakeTensor):
            mode = v.fake_mode
            break
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = ir.attribute(module, node.target)
            if isinstance(value, nn.Module) or not isinstance(value, torch.Tensor):
                set_attribute(gm, node.target, value)
                env[node] = graph.get_attr(node.target)
                env[node].meta = dict(node.meta)
                continue
            if id(value) in leaves:  # a tie: one node for one tensor
                env[node] = leaves[id(value)]
                continue
            new = _leaf(graph, gm, node, value, parameters, buffers, persistent, mode)
            env[node] = leaves[id(value)] = new
            continue
        if node.op == "call_function" and node.target is aten._assert_tensor_metadata.default:
            continue  # would count as a reader of every cast tensor
        new = graph.node_copy(node, lambda n: env[n])
        env[node] = new
        if node.op == "placeholder":
            new.meta["kind"] = "input"
            new.meta["fqn"] = next(in_names, node.name)
    _placeholders_first(graph)
    graph._codegen = module.graph._codegen
    gm.graph = graph
    for name, tensor in (*parameters.items(), *buffers.items()):
        if not ir.has_attribute(gm, name):
            set_attribute(gm, name, tensor, persistent=name in persistent)
    gm.train(module.training)
    gm.meta["range_constraints"] = {str(k): str(v) for k, v in program.range_constraints.items()}
    _drop_dead_lifts(gm)
    read_marks(gm, program.graph_module.meta.get("regions", {}))
    gm.meta["functions"] = program.graph_module.meta.get("functions", [])
    gm.meta["state"] = program.graph_module.meta.get("state", [])
    return gm


def out_spec(gm: fx.GraphModule) -> pytree.TreeSpec:
    """The structure of a captured graph's output."""
    codegen: Any = gm.graph._codegen
    return codegen.pytree_info.out_spec


def _placeholders_first(graph: fx.Graph) -> None:
    """Weight expressions go right behind the weights, which must not be ahead of the inputs."""
    first = next(iter(graph.nodes))
    for node in graph.find_nodes(op="placeholder"):
        if node is not first:
            first.prepend(node)
        else:
            first = node.next


def _input_names(program: torch.export.ExportedProgram) -> list[str]:
    return list(program.graph_signature.user_inputs)


def _leaf(
    graph: fx.Graph,
    gm: fx.GraphModule,
    node: fx.Node,
    value: torch.Tensor,
    parameters: dict[str, nn.Parameter],
    buffers: dict[str, torch.Tensor],
    persistent: set[str],
    mode: Any,
) -> fx.Node:
    name = node.target
    kind = "param" if name in parameters else "buffer" if name in buffers else "constant"
    set_attribute(gm, name, value, persistent=name in persistent)
    new = graph.get_attr(name)
    new.meta = dict(node.meta)
    if "val" not in new.meta:
        new.meta["val"] = value if mode is None else mode.from_tensor(value, static_shapes=True)
    new.meta["kind"], new.meta["fqn"] = kind, name
    return new


def set_attribute(module: nn.Module, path: str, value: Any, *, persistent: bool = True) -> None:
    *parents, last = path.split(".")
    for part in parents:
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            module.add_module(part, child)
        module = child
    if isinstance(value, nn.Parameter):
        module.register_parameter(last, value)
    elif isinstance(value, torch.Tensor):
        module.register_buffer(last, value, persistent=persistent)
    elif isinstance(value, nn.Module):
        module.add_module(last, value)
    else:
        setattr(module, last, value)


def _drop_dead_lifts(gm: fx.GraphModule) -> None:
    """``lift_fresh_copy`` + ``detach_`` of a constant is how export spells a literal tensor."""
    for node in list(gm.graph.nodes):
        if ir.is_call(node, aten.detach_.default) and ir.is_call(
            node.args[0], aten.lift_fresh_copy.default
        ):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


# ---------------------------------------------------------------------------------------------
# Existing fx graphs (Dynamo's among them)


def capture_fx(gm: fx.GraphModule, fakes: Sequence[Any], *, fake_mode: Any) -> fx.GraphModule:
    """Retrace an fx graph to pre-dispatch ATen, keeping module paths and stack traces.

    Args:
        gm: graph with flat placeholders (Dynamo's form).
        fakes: one fake tensor, SymInt or constant per placeholder.
        fake_mode: the mode of the fake tensors; its symbolic sizes are kept.

    The placeholders of the result correspond one to one to those of ``gm``. ``kind`` and ``fqn`` of
    each are set by the caller (:func:`mark_dynamo_leaves`). Checkpointed regions are laid out, their
    nodes tagged (see ``subgraphs.py``).

    Raises:
        Unsupported: the graph holds something that cannot be retraced.
    """
    regions: dict[int, Region] = {}

    def run(*inputs: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return Retrace(gm, regions, fake_mode).run(*inputs)

    with fake_mode:
        traced = make_fx(run, pre_dispatch=True)(*fakes)
    for new, value in zip(
        (n for n in traced.graph.nodes if n.op == "placeholder"), fakes, strict=True
    ):
        new.meta.setdefault("val", value)
        new.meta["kind"] = "input"
    _mark_constants(traced, fake_mode)
    for node in list(traced.graph.nodes):
        if ir.is_call(node, aten._assert_tensor_metadata.default):
            traced.graph.erase_node(node)
    _drop_dead_lifts(traced)
    traced.meta["regions"] = regions
    return traced


def _mark_constants(gm: fx.GraphModule, mode: Any) -> None:
    """Tensors that tracing lifted into attributes are constants; give them fake values."""
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        value = ir.attribute(gm, node.target)
        if isinstance(value, torch.Tensor):
            node.meta.setdefault("kind", "constant")
            node.meta.setdefault("fqn", node.target)
            if not isinstance(node.meta.get("val"), torch.Tensor):
                node.meta["val"] = mode.from_tensor(value, static_shapes=True)


def _rename_provenance(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["module"] = clean_path(str(list(stack.values())[-1][0]))
        trace = node.meta.get("stack_trace")
        if trace:
            node.meta["where"] = user_frame(trace)


def mark_dynamo_leaves(source: fx.GraphModule, traced: fx.GraphModule) -> None:
    """Copy what Dynamo knows of each placeholder, and say which are parameters and buffers.

    Dynamo lifts parameters to placeholders whose source ends in a module's ``_parameters`` or
    ``_buffers`` entry. The AOT stage reads ``_dynamo_source`` and ``tensor_dict`` (static inputs).
    """
    old = [n for n in source.graph.nodes if n.op == "placeholder"]
    new = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for a, b in zip(old, new, strict=True):
        b.meta = {**{k: v for k, v in a.meta.items() if k != "example_value"}, **b.meta}
        dynamo_source = getattr(a, "_dynamo_source", None)
        if dynamo_source is not None:
            b._dynamo_source = dynamo_source
        if not isinstance(b.meta.get("val"), torch.Tensor):
            b.meta["kind"], b.meta["fqn"] = "input", a.name
            continue
        name = getattr(dynamo_source, "name", "") if dynamo_source is not None else ""
        name = name() if callable(name) else name
        if "_parameters" in name:
            b.meta["kind"] = "param"
        elif "_buffers" in name:
            b.meta["kind"] = "buffer"
        else:
            b.meta["kind"] = "input"
        b.meta["fqn"] = clean_path(name) if name else a.name
