"""Options of ``torch.compile(backend="normfuse", options={…})``: ours, documented, and Inductor's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..passes.errors import NormfuseError


@dataclass(frozen=True)
class Options:
    """What the backend understands itself.

    Attributes:
        passes: a preset (``"exact"``, ``"canonical"``, ``"rotation_ready"``) or a list of passes
            (instances or registered names). Passes that change the function must be asked for
            by name.
        policy: ``"pays"`` lets the cost model decline; ``"always"`` rewrites whatever is exact.
        disable: names of passes to switch off (the environment variable ``NORMFUSE_DISABLE`` adds
            to it).
        verify: compare the float64 results of each captured graph before and after recognition and
            after every pass, and the working dtype's error with eager's own.
        strict: raise on any failure of ours, verification's too, instead of falling back to
            Inductor with a warning.
        fuel: number of site rewrites allowed, for bisection.
        max_folded_bytes: under the policy ``"pays"``, the memory a graph may spend on folded copies
            of weights in inference; a graph that wants more is left alone.
        kernels: let our own kernels take the sites they are for: Triton's on CUDA and ROCm, those
            their cost model wants; C++ on CPUs, gates. By default (``None``) only the latter: Triton's
            are proved by interpreter and cross-compilation, not yet timed on a GPU. ``False``: Inductor
            compiles all of the rewritten graph.
        inductor: everything else, validated against Inductor's own configuration.
    """

    passes: Any = "exact"
    policy: str = "pays"
    disable: tuple[str, ...] = ()
    verify: bool = False
    strict: bool = False
    fuel: int | None = None
    max_folded_bytes: int = 2 << 30
    kernels: bool | None = None
    inductor: dict[str, Any] = field(default_factory=dict)


_TYPES: dict[str, tuple[type, ...]] = {
    "passes": (str, list, tuple),
    "policy": (str,),
    "disable": (list, tuple, set, frozenset, str),
    "verify": (bool,),
    "strict": (bool,),
    "fuel": (int, type(None)),
    "max_folded_bytes": (int,),
    "kernels": (bool, type(None)),
}

OWN = tuple(f.name for f in fields(Options) if f.name != "inductor")


def parse(
    options: Mapping[str, Any] | None, mode: str | None = None, dynamic: bool | None = None
) -> Options:
    """Split ``options`` into ours and Inductor's and validate both.

    Raises:
        NormfuseError: unknown option, wrong type or value; lists what is valid.
    """
    from ..passes.manager import registry
    from ..passes.presets import PRESETS

    own: dict[str, Any] = {}
    inductor = _mode_options(mode, dynamic)
    for name, value in (options or {}).items():
        if name in OWN:
            if not isinstance(value, _TYPES[name]) or (name == "fuel" and isinstance(value, bool)):
                expected = " or ".join(t.__name__ for t in _TYPES[name])
                raise NormfuseError(
                    f"option {name!r} must be {expected}, got {type(value).__name__}"
                )
            own[name] = value
        else:
            inductor[_checked_inductor_name(name, value)] = value
    if own.get("policy", "pays") not in ("pays", "always"):
        raise NormfuseError(f"option 'policy' must be 'pays' or 'always', got {own['policy']!r}")
    if isinstance(own.get("passes"), str) and own["passes"] not in PRESETS:
        raise NormfuseError(
            f"no preset is called {own['passes']!r}; known: {', '.join(sorted(PRESETS))}"
        )
    if "disable" in own:
        disable = own["disable"]
        own["disable"] = (disable,) if isinstance(disable, str) else tuple(sorted(disable))
        unknown = set(own["disable"]) - set(registry())
        if unknown:
            raise NormfuseError(
                f"option 'disable' names unknown passes {sorted(unknown)}; "
                f"known: {', '.join(registry())}"
            )
    return Options(**own, inductor=inductor)


def _mode_options(mode: str | None, dynamic: bool | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    import torch._inductor

    known = torch._inductor.list_mode_options(dynamic=dynamic)
    if mode not in known:
        raise NormfuseError(f"no mode is called {mode!r}; known: {', '.join(sorted(known))}")
    return dict(known[mode])


def _checked_inductor_name(name: str, value: Any) -> str:
    from torch._inductor import config

    attribute = name.replace("-", "_")
    known = config.get_config_copy()
    if attribute not in known:
        import difflib

        near = difflib.get_close_matches(attribute, [*OWN, *known], n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        raise NormfuseError(
            f"unknown option {name!r}{hint} Options of normfuse are {', '.join(OWN)}; any option of "
            "torch._inductor (torch._inductor.list_options()) is passed on to it"
        )
    default = known[attribute]
    if default is not None and isinstance(default, (bool, int, str)):
        if not isinstance(value, type(default)):
            raise NormfuseError(
                f"option {name!r} must be {type(default).__name__}, got {type(value).__name__}"
            )
    return attribute
