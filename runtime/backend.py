"""``torch.compile(model, backend="normfuse")``.

Dynamo's graph → pre-dispatch ATen → norms recognized → exact passes that pay → lowering → Inductor.
Where nothing pays, Inductor gets Dynamo's graph untouched, so nothing can be lost. Where anything of
ours fails, the same happens, with one warning (``strict=True`` raises instead).
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext

from ..passes import ir
from ..passes.autocast import ambient, disabled, restore
from ..passes.capture import capture_fx, finish, mark_dynamo_leaves
from ..passes.contract import Context
from ..passes.errors import NormfuseError, Unsupported, VerificationError
from ..passes.func_transforms import release
from ..passes.manager import PassManager
from ..passes.paths import user_frame
from ..passes.presets import resolve
from ..passes.report import Report
from ..passes.snapshot import copy_graph
from ..passes.subgraphs import dissolve, emit_dynamo, outline
from ..passes.verify import check_recognition, check_working
from ..passes.warn import warn
from ..passes.weights import WeightCache, WeightProgram, keep_nonfinite, mark_recompute, split
from . import autotune_cache, kernel_failures, lower_checks
from .lower import expand
from .lower_cpp import lower_to_cpp
from .lower_kernels import lower_to_kernels, summary
from .options import Options, parse
from .provenance import source_hash, trace_artifact
from .transform import left_alone

log = logging.getLogger("normfuse")

#: Dynamo's own signals (start the analysis over with other assumptions) pass through.
_CONTROL_FLOW = (RestartAnalysis, SkipFrame)

_reports: deque[Report] = deque(maxlen=256)
_warned: set[str] = set()
_lock = threading.Lock()


def reports() -> list[Report]:
    """Reports of the graphs compiled in this process, oldest first (one per captured graph)."""
    return list(_reports)


def clear_reports() -> None:
    _reports.clear()


def normfuse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Callable:
    """The Dynamo backend. Users reach it through ``torch.compile(…, backend="normfuse")``.

    Args:
        gm, example_inputs: from Dynamo.
        mode: Inductor's compile mode (``"reduce-overhead"``, ``"max-autotune"``…).
        options: see :class:`~normfuse.runtime.options.Options`; other names go to Inductor.

    Raises:
        NormfuseError: unknown options; with ``strict``, anything that would make it fall back.
    """
    if kwargs:
        raise NormfuseError(f"unknown backend arguments {sorted(kwargs)}")
    settings = parse(options, mode)
    report = Report()
    start = time.perf_counter()
    try:
        program = rewrite_dynamo(gm, example_inputs, settings, report)
    except _CONTROL_FLOW:
        raise
    except Unsupported as refusal:  # not a failure: there is nothing of ours to do here
        # only the sentence: interpreters append the graph's text and a traceback
        report.notes.append(f"left to Inductor: {refusal}".splitlines()[0])
        program = None
    except Exception as error:
        if settings.strict:
            raise
        _warn_once(error)
        report.notes.append(f"fell back to Inductor: {type(error).__name__}: {error}")
        program = None
    report.seconds = time.perf_counter() - start
    with _lock:
        _reports.append(report)
    trace_artifact("normfuse_report", report.to_dict)
    if program is None:
        return inductor(gm, example_inputs, settings)
    try:
        return program.compile(example_inputs, settings)
    except _CONTROL_FLOW:
        with _lock:
            _reports.remove(report)
        raise
    except Exception as error:
        if settings.strict:
            raise
        _warn_once(error)
        reason = f"the rewritten graph did not compile: {error}".splitlines()[0]
        report.notes.append(f"fell back to Inductor: {reason}")
        refuse_all(report, reason)
        return inductor(gm, example_inputs, settings)


def _warn_once(
    error: BaseException, consequence: str = "normfuse left a graph to Inductor unchanged"
) -> None:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    log.debug(consequence, exc_info=error)
    with _lock:
        if text in _warned:
            return
        _warned.add(text)
    warn(f'{consequence}: {text} (options={{"strict": True}} raises with a traceback)')


def inductor(gm: fx.GraphModule, inputs: Sequence[Any], settings: Options) -> Callable:
    """Plain Inductor with the user's options."""
    from torch._inductor.compile_fx import compile_fx

    with contextlib.ExitStack() as stack:
        if any(getattr(n.target, "namespace", "") == "normfuse" for n in gm.graph.nodes):
            stack.enter_context(_cache_key(source_hash()))  # formulas are no part of the key
        compiled: Any = compile_fx(gm, list(inputs), config_patches=dict(settings.inductor))
    return compiled


class Program:
    """A rewritten graph, ready to be compiled, with its weight program if it has one.

    ``leaves`` are the inputs its weight program reads; ``spare`` makes the same program without
    kernels, for where one of them does not compile.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        cache: WeightCache | None = None,
        leaves: Sequence[int] = (),
        spare: Callable[[], Program] | None = None,
    ) -> None:
        self.gm, self.cache, self.leaves, self.spare = gm, cache, leaves, spare

    def compile(self, inputs: Sequence[Any], settings: Options) -> Callable:
        try:
            return self._compile(inputs, settings)
        except _CONTROL_FLOW:
            raise
        except Exception as error:
            if self.spare is None or settings.strict:
                raise
            _warn_once(error, "normfuse's kernels did not compile, their formulas run instead")
            _remember(self.gm, _where(inputs), error)
            return self.spare()._compile(inputs, settings)

    def _compile(self, inputs: Sequence[Any], settings: Options) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        tag = source_hash()
        if self.spare is not None:
            # tuned plans are chosen inside op bodies, which compile-cache keys do not see
            tag += autotune_cache.fingerprint(_where(inputs))
        expand(self.gm)
        restore(self.gm)
        release(self.gm)
        outline(self.gm, emit_dynamo)
        self.gm.recompile()
        trace_artifact("normfuse_after", lambda: self.gm.print_readable(print_output=False))
        for node in self.gm.graph.find_nodes(op="placeholder"):
            # Inductor's C++ wrapper would take these for the inputs; no gradient flows into them
            node.meta.pop("val", None)
        inputs = list(inputs)
        cache = self.cache
        if cache is not None:
            mode = _fake_mode()
            folded = cache([inputs[i] for i in self.leaves])
            # fakes with static shapes: Dynamo has no guards for tensors it never saw
            inputs += [mode.from_tensor(t, static_shapes=True) for t in folded]
        with contextlib.ExitStack() as stack:
            for context in disabled(self.gm.meta.get("autocast", ())):
                stack.enter_context(context)
            stack.enter_context(_cache_key(tag))
            compiled: Any = compile_fx(self.gm, inputs, config_patches=dict(settings.inductor))
        if cache is None:
            return compiled
        return _with_folded(compiled, cache, self.leaves)


def _remember(gm: fx.GraphModule, device: torch.device, error: Exception) -> None:
    """Keep for ``normfuse doctor`` which kernels a graph that did not compile has."""
    ours = [
        n for n in gm.graph.nodes if getattr(n.target, "namespace", "") == lower_checks.NAMESPACE
    ]
    kernels = sorted({n.target._schema.name.split("::")[1] for n in ours})
    types = sorted({str(ir.dtype(n.args[0])).removeprefix("torch.") for n in ours})
    reason = f"{type(error).__name__}: {error}"
    where = f"{', '.join(types)}; in a compiled graph"
    kernel_failures.record(device, ", ".join(kernels), where, reason)


def _with_folded(compiled: Callable, cache: WeightCache, leaves: Sequence[int]) -> Callable:
    def run(*args: Any) -> Any:
        folded = cache([args[i] for i in leaves])
        return compiled(*args, *folded)

    run.weight_cache = cache  # type: ignore[attr-defined]
    return run


@contextlib.contextmanager
def _cache_key(tag: str) -> Any:
    """Put a hash of our sources into the keys of PyTorch's compile caches."""
    from torch.compiler import config

    previous = config.cache_key_tag
    patch: Any = config.patch  # type: ignore[attr-defined]
    with patch(cache_key_tag=f"{previous}+normfuse-{tag}"):
        yield


def _fake_mode() -> Any:
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise NormfuseError("the backend must be called by torch.compile")
    return context.fake_mode


def _itself(x: Any) -> Any:
    return x


def _fakes(inputs: Sequence[Any], mode: Any) -> list[Any]:
    """Fake inputs with the symbolic sizes Dynamo chose."""
    known = TracingContext.get().tensor_to_context
    out = []
    for x in inputs:
        if isinstance(x, torch.Tensor) and not isinstance(x, torch._subclasses.FakeTensor):
            symbolic = known.get(x)
            source = symbolic.tensor_source if symbolic is not None else None
            out.append(
                mode.from_tensor(x, static_shapes=False, symbolic_context=symbolic, source=source)
            )
        else:
            out.append(x)
    return out


def rewrite_dynamo(
    gm: fx.GraphModule, inputs: Sequence[Any], settings: Options, report: Report
) -> Program | None:
    """Capture, recognize and rewrite one Dynamo graph; ``None`` if it should stay as it is."""
    _only_plain_tensors(gm, inputs)
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if not tensors:
        return None
    mode = _fake_mode()
    env = mode.shape_env
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    with contextlib.ExitStack() as stack:
        if env is not None:
            stack.enter_context(env.ignore_fresh_unbacked_symbols())
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            # a checkpoint around the model counts what is saved: not what a trace saves
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))
        traced = capture_fx(gm, _fakes(inputs, mode), fake_mode=mode)
        mark_dynamo_leaves(gm, traced)
        traced.meta.update({k: v for k, v in gm.meta.items() if k not in traced.meta})
        if hasattr(gm, "_param_name_to_source"):
            # AOT wants a source for every attribute; constants that tracing lifted get their own
            traced._param_name_to_source = {
                name: ConstantSource(f"normfuse_{name}")
                for name, _ in (*traced.named_parameters(), *traced.named_buffers())
            }
        if not training:
            dissolve(traced)
        sites = finish(traced, autocast=ambient(), remember=settings.verify)
        report.sites.extend(sites)
        report.notes += traced.meta["notes"]
        report.notes += left_alone(keep_nonfinite(traced, inputs))
        context = Context(
            training=training,
            device=_where(tensors).type,
            policy=settings.policy,
            disabled=frozenset(settings.disable),
            fuel=settings.fuel,
            options={"dynamo": {"backend": True}},  # nowhere to keep new parameters
        )
        if settings.verify:
            traced.meta["example_inputs"] = list(inputs)
            if wrong := check_recognition(traced, context):
                PassManager([], context).run(traced, report)  # lists the sites
                raise _failed(report, f"after recognition: {wrong}")
        trace_artifact("normfuse_before", lambda: traced.print_readable(print_output=False))
        manager = PassManager(resolve(settings.passes), context, verify=settings.verify)
        manager.run(traced, report)
        if settings.verify:
            _verified(traced, context, report, settings)
    applied = any(s.applied for s in report.sites)
    spare, lowered = None, []
    device = _where(tensors)
    if settings.kernels and device.type == lower_checks.DEVICE:
        spare = _copy(traced)
        lowered = lower_to_kernels(traced, device, policy=settings.policy)
    elif settings.kernels is not False and device.type == "cpu":
        lowered = lower_to_cpp(traced, policy=settings.policy)
    report.notes += summary(lowered)
    ours = any(entry.kernel for entry in lowered)
    if not ours:
        spare = None
    if training and not applied and not ours:
        report.notes.append(
            "gradients are enabled, so folded weights would be recomputed at every step; "
            "for inference call the model under torch.no_grad()"
        )
    if not applied and not ours:
        return None
    limit = settings.max_folded_bytes if settings.policy == "pays" else math.inf
    again = None if spare is None else lambda: _program(spare, training, limit)
    program = _program(traced, training, limit, again)
    if program.cache is None:
        return program
    size = program.cache.program.bytes
    if size > limit:
        refuse_all(
            report,
            f"folded weights would take {size / 2**20:.0f} MiB beside the original ones, "
            f"more than max_folded_bytes ({settings.max_folded_bytes / 2**20:.0f} MiB)",
        )
        return None
    report.weight_bytes = size
    return program


def _verified(gm: fx.GraphModule, context: Context, report: Report, settings: Options) -> None:
    """Error figures for the report; raise if the rewritten graph is not to be used."""
    report.max_relative_error = max(context.errors, default=0.0)
    if report.failed_verification:  # the passes at fault are undone
        said = [n for n in report.notes if n.startswith("verification failed")]
        error = VerificationError("; ".join(said))
        if settings.strict:
            raise error
        _warn_once(error, "normfuse undid rewrites")
    if context.journal and (worse := check_working(gm, context, report)):
        raise _failed(report, f"in the working dtype: {worse}")
    for name in ("example_inputs", "captured"):
        gm.meta.pop(name, None)


def _failed(report: Report, reason: str) -> VerificationError:
    """Nothing of this graph is used; what was applied becomes refused."""
    report.failed_verification = True
    refuse_all(report, "verification failed")
    return VerificationError(f"verification failed {reason}")


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, torch._subclasses.FakeTensor)


def _only_plain_tensors(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Raise before anything is traced: a trace of subclasses may leave guards behind."""
    for x in inputs:
        if isinstance(x, torch.Tensor) and type(x) not in _PLAIN:
            raise Unsupported(f"an input is a {type(x).__name__} (sharded, quantized, nested…)")
    for node in gm.graph.nodes:
        x = node.meta.get("example_value")
        if isinstance(x, torch.Tensor) and type(x) not in _PLAIN:
            frame = user_frame(node.meta.get("stack_trace") or "")
            place = f" at {frame}" if frame else ""
            raise Unsupported(f"the graph makes a {type(x).__name__}{place} (sharded, nested…)")


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Another graph over the same parameters and buffers."""
    new = fx.GraphModule(gm, copy_graph(gm.graph))
    new.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        new._param_name_to_source = gm._param_name_to_source
    return new


def _program(
    gm: fx.GraphModule,
    training: bool,
    limit: float,
    spare: Callable[[], Program] | None = None,
) -> Program:
    """``gm`` with its weight program inline (training) or cut out and cached."""
    if training:
        mark_recompute(gm)
        return Program(gm, spare=spare)
    program = split(gm)
    if program is None:
        return Program(gm, spare=spare)
    for node in gm.graph.find_nodes(op="placeholder")[-_outputs(program) :]:
        node._dynamo_source = None
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return Program(gm, shared_cache(program, limit), program.leaves, spare)


def refuse_all(report: Report, reason: str) -> None:
    """Turn everything that was applied into refusals: the rewritten graph is not used after all."""
    for site in report.sites:
        site.refused += [(name, reason) for name in site.applied]
        site.applied = []
        site.bytes_saved = site.flops_saved = 0.0
    for record in report.passes:
        record.applied, record.refused = 0, record.refused + record.applied


def _outputs(program: Any) -> int:
    output = next(n for n in program.module.graph.nodes if n.op == "output")
    return len(output.args[0])


def _where(inputs: Sequence[Any]) -> torch.device:
    """The accelerator the graph runs on, else the CPU."""
    devices = [x.device for x in inputs if isinstance(x, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


_caches: weakref.WeakValueDictionary[tuple, WeightCache] = weakref.WeakValueDictionary()


def shared_cache(program: WeightProgram, limit: float) -> WeightCache:
    """One cache for one program, however many graphs use it."""
    with _lock:
        return _caches.setdefault((program.key, limit), WeightCache(program, limit))
