"""``normfuse.calibrate``: which channels and tokens are outliers, where, and what they do.

The captured graph is instrumented, not the modules: any architecture, any spelling, tied modules
called twice get one entry per call. One forward per batch, bounded memory, float64 sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..passes import ir
from ..passes.autocast import ambient, disabled
from ..passes.capture import capture
from ..passes.errors import NormfuseError
from ..passes.modes import evaluating
from .calibration import Calibration, Entry
from .probes import (
    Probe,
    ProbeInterpreter,
    find_probes,
    four_dims,
    rows_of,
    watch_sdpa,
    watch_softmax,
)
from .signature import Signature
from .statistics import Accumulator, Attention, Channels

__all__ = ["Calibration", "calibrate"]


class _Watched:
    """One captured graph with its probes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.signature = Signature(gm)
        self.probes = find_probes(gm)
        self.autocast = gm.meta.get("autocast", ())


@dataclass
class _Run:
    calibration: Calibration
    min_keys: int
    mask: Tensor | None = None
    unmasked: set[str] = field(default_factory=set)
    #: the gains of this batch's run: a gain is computed before or after the value it scales
    gains: dict[str, Tensor] = field(default_factory=dict)

    def entry(self, probe: Probe, size: int) -> Entry:
        entry = self.calibration.entries.get(probe.key)
        if entry is None:
            stats: Accumulator = (
                Attention(size, self.min_keys) if probe.kind == "attention" else Channels(size)
            )
            entry = Entry(
                probe.key,
                probe.kind,
                probe.order,
                probe.module,
                probe.where,
                list(probe.readers),
                probe.stream,
                stats,  # type: ignore[arg-type]
            )
            self.calibration.entries[probe.key] = entry
        return entry

    def on_value(self, probe: Probe, value: Tensor) -> None:
        rows = rows_of(value.detach(), probe.dims)
        if self.mask is not None:
            keep = self._kept(value, probe.dims)
            if keep is None:
                self.unmasked.add(probe.key)
            else:
                rows = rows[keep.to(rows.device)]
        self.entry(probe, rows.shape[1]).stats.update(rows)  # type: ignore[union-attr]

    def _kept(self, value: Tensor, dims: Sequence[int]) -> Tensor | None:
        """The mask for the rows of ``value``, or ``None`` if the mask is not about its dims."""
        assert self.mask is not None
        features = {d % value.dim() for d in dims}
        leading = tuple(s for i, s in enumerate(value.shape) if i not in features)
        n = self.mask.dim()
        if leading == (self.mask.numel(),):  # tokens flattened into one dim
            return self.mask.flatten()
        if leading[:n] != tuple(self.mask.shape):
            return None
        rest = leading[n:]
        return self.mask.reshape(*self.mask.shape, *[1] * len(rest)).expand(leading).flatten()

    def on_gain(self, probe: Probe, gain: Tensor) -> None:
        self.gains[probe.key] = gain.detach()

    def on_attention(
        self, probe: Probe, node: fx.Node, args: tuple, kwargs: dict, result: Any, extra: dict
    ) -> None:
        shown = extra.get("value", args[0] if args else None)
        stats = self.entry(probe, shown.shape[-3] if shown.dim() > 3 else 1).stats
        assert isinstance(stats, Attention)
        if "value" in extra:
            stats.update_values(four_dims(shown))
        elif "scaled_dot_product" in str(node.target):
            watch_sdpa(stats, node, args, kwargs)
        else:
            watch_softmax(stats, shown.detach())

    def finish_batch(self) -> None:
        for key, gain in self.gains.items():
            entry = self.calibration.entries[key]
            width = entry.stats.width  # type: ignore[union-attr]
            if entry.gain is None and gain.numel() in (1, width):
                entry.gain = gain.to("cpu", torch.float64).flatten().expand(width).clone()
        self.gains.clear()
        self.calibration.batches += 1


def _is_captured(model: Any) -> bool:
    """True for what ``passes.capture`` returns: rewritten graphs are watched as they are."""
    return isinstance(model, fx.GraphModule) and all(
        "kind" in n.meta for n in model.graph.find_nodes(op="placeholder")
    )


def _call_of(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments of a batch: a tensor, a tuple of them, or a mapping."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return (batch,), {}


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    progress: bool = True,
    *,
    mask: str | None = None,
    min_keys: int = 64,
    checkpoint: str | os.PathLike | None = None,
    save_every: int = 50,
    dynamic: bool = True,
) -> Calibration:
    """Collect activation statistics of ``model`` over ``batches``.

    Args:
        model: any module that can be captured; it is run in eval mode and without gradients, its
            modes are restored. A graph from ``passes.capture`` (rewritten or not) is run as it is.
        batches: iterable of batches, each a tensor (the only argument), a tuple or list of
            positional arguments, or a mapping of keyword arguments. All alike in structure; sizes
            may vary. Consumed one by one.
        progress: show a progress bar.
        mask: name of a keyword input whose zeros mark tokens not to count
            (``"attention_mask"``): values whose leading dims are the mask's are filtered.
        min_keys: attention sinks are judged by queries that see at least this many keys.
        checkpoint: a file to save to every ``save_every`` batches. If it exists, its batches are
            skipped in ``batches`` and its numbers are added to: an interrupted run goes on.
        dynamic: capture with symbolic sizes where possible.

    Raises:
        NormfuseError: no batches, or a batch whose structure differs from the first one's.
        CaptureError: the model cannot be captured.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise NormfuseError(
            f"batches must be an iterable of batches, such as [batch], got {type(batches).__name__}"
        )
    if save_every < 1:
        raise NormfuseError(f"save_every must be at least 1, got {save_every!r}")
    calibration = Calibration() if checkpoint is None else _resumed(Path(checkpoint), min_keys)
    skip = calibration.batches
    run = _Run(calibration, min_keys)
    graphs: list[_Watched] = []
    structure: pytree.TreeSpec | None = None
    own = evaluating(model) if isinstance(model, nn.Module) else nullcontext()
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    seen = 0
    with own, torch.no_grad():
        for batch in _bar(batches, total, progress):
            args, kwargs = _call_of(batch)
            flat, spec = pytree.tree_flatten((args, kwargs))
            if structure is None:
                structure = spec
            elif spec != structure:
                raise NormfuseError(
                    f"batch {seen} has the structure {spec}, the first batch had {structure}"
                )
            seen += 1
            if seen <= skip:
                continue
            if mask is not None:
                if not isinstance(kwargs.get(mask), Tensor):
                    raise NormfuseError(f"batch {seen - 1} has no tensor input called {mask!r}")
                run.mask = kwargs[mask] != 0
            watched = next((g for g in graphs if g.signature.matches(flat)), None)
            if watched is None:
                if _is_captured(model):
                    if graphs:
                        raise NormfuseError(
                            f"batch {seen - 1} does not fit the sizes this graph was captured for; "
                            "calibrate the model itself, or capture it with dynamic=True"
                        )
                    watched = _Watched(model)  # type: ignore[arg-type]
                else:
                    watched = _Watched(capture(model, args, kwargs, dynamic=dynamic))
                if not watched.probes:
                    raise NormfuseError(
                        "nothing to calibrate: the model has no norm, linear layer or attention"
                    )
                if skip and not graphs:
                    _check_same_model(calibration, watched.probes, checkpoint)
                graphs = [*graphs[-15:], watched]
            interpreter = ProbeInterpreter(
                watched.gm, watched.probes, run.on_value, run.on_gain, run.on_attention
            )
            with ExitStack() as off:
                for context in (*disabled(watched.autocast), *disabled(ambient())):
                    off.enter_context(context)
                interpreter.run(*flat, enable_io_processing=False)
            run.finish_batch()
            if checkpoint is not None and calibration.batches % save_every == 0:
                calibration.save(checkpoint)
    if seen == 0:
        raise NormfuseError("no batches: calibration needs at least one")
    if seen < skip:
        raise NormfuseError(
            f"{checkpoint} holds {skip} batches and only {seen} were given: it is not of this run; "
            "move it away or name another file"
        )
    if run.unmasked:
        calibration.notes.append(
            f"the mask {mask!r} does not fit {len(run.unmasked)} values, which count all rows "
            f"(first: {min(run.unmasked)})"
        )
    for entry in calibration.entries.values():
        entry.stats.to(torch.device("cpu"))
    if checkpoint is not None:
        calibration.save(checkpoint)
    return calibration


def _resumed(path: Path, min_keys: int) -> Calibration:
    """What an interrupted run left in ``path``; a path that cannot be saved to fails now."""
    Calibration.check_path(path)
    if not path.exists():
        return Calibration()
    calibration = Calibration.load(path)
    for entry in calibration.of_kind("attention"):
        if entry.stats.min_keys != min_keys:  # type: ignore[union-attr]
            raise NormfuseError(
                f"{path} was made with min_keys={entry.stats.min_keys}, "  # type: ignore[union-attr]
                f"not {min_keys}"
            )
    return calibration


def _check_same_model(
    calibration: Calibration, probes: Sequence[Probe], path: str | os.PathLike | None
) -> None:
    """Refuse to add one model's numbers to another's."""
    here = {p.key for p in probes}
    if odd := sorted(here ^ calibration.entries.keys()):
        where = "this model" if odd[0] in here else "the file"
        raise NormfuseError(
            f"{path} is a calibration of another model: {len(odd)} places are known to only one of "
            f"them (only {where} has {odd[0]})"
        )
    for p in probes:
        size = ir.shape(p.node)[p.dims[0]] if len(p.dims) == 1 and p.kind != "attention" else None
        width = getattr(calibration.entries[p.key].stats, "width", None)
        if isinstance(size, int) and size != width:
            raise NormfuseError(
                f"{path} is a calibration of another model: {p.key} has width {width} there and "
                f"{size} here"
            )


def _bar(batches: Iterable[Any], total: int | None, progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, total=total, desc="calibrating", unit="batch")
