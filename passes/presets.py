"""Named lists of passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .contract import Pass
from .errors import NormfuseError
from .manager import instantiate, registry
from .rotation import gaps

#: Order matters: affines fold first, means go next, then the row scale moves, then linears merge.
PRESETS: dict[str, tuple[str, ...]] = {
    "exact": (
        "fold_batch_norm",
        "fold_static_scale",
        "fold_affine",
        "remove_mean",
        "defer_scale",
        "merge_linears",
        "fuse_residual_norm",
    ),
    "canonical": (),
    "rotation_ready": ("fold_static_scale", "fold_affine", "remove_mean"),
}


#: What asking for rotation readiness gives up, said in its report.
ROTATION_NOTE = (
    "rotation_ready folds every gain: rotations need norms without gains, and activations then lose "
    "whatever a small gain hid. A rotation spreads a huge channel over all others; without one, or "
    "with a gate in its place, leave such gains unfolded (FoldAffine(keep=[…]))"
)


def resolve(passes: str | Iterable[Any]) -> list[Pass]:
    """Pass instances for a preset's name or a list of passes, classes or registered names.

    Raises:
        NormfuseError: unknown preset or pass.
    """
    known = registry()
    if isinstance(passes, str):
        if passes not in PRESETS:
            if passes in known:
                return [known[passes]()]
            raise NormfuseError(
                f"no preset or pass is called {passes!r}; presets: {sorted(PRESETS)}, "
                f"passes: {sorted(known)}"
            )
        options = {"fold_affine": {"copy_tied": True}} if passes == "rotation_ready" else {}
        chosen = [known[n](**options.get(n, {})) for n in PRESETS[passes] if n in known]
        if passes == "rotation_ready":
            for p in chosen:
                p.note = ROTATION_NOTE if p.name == "fold_affine" else ""
            chosen[-1].closing = gaps
        return chosen
    return [instantiate(p) for p in passes]


def policy_of(passes: str | Iterable[Any]) -> str:
    """The cost policy a preset implies: asking for rotation readiness means regardless of speed."""
    return "pays" if passes == "exact" else "always"
