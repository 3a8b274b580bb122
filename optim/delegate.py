"""``Delegate``: an optimizer that is another one, but for its step."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class Delegate(Optimizer):
    """Groups, states, hooks, schedulers and checkpoints stay with ``inner``; subclasses add a step.

    A subclass that needs state of its own returns it from ``extra_state`` and takes it back in
    ``load_extra_state``; it travels in the state dict under the key ``normfuse``.
    """

    #: A GradScaler would give its factor to this object, which a fused inner step does not look at;
    #: so it unscales gradients and skips steps itself.
    _step_supports_amp_scaling = False

    def __init__(self, inner: Optimizer) -> None:
        if not isinstance(inner, Optimizer):
            raise TypeError(f"a torch.optim.Optimizer is needed, got {type(inner).__name__}")
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __getstate__(self) -> dict[str, Any]:
        # a scheduler leaves its wrapper of ``step`` here, which would go on stepping this object
        return {k: v for k, v in self.__dict__.items() if k != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.inner!r}"

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        out = self.inner.state_dict()
        extra = self.extra_state()
        return {**out, "normfuse": extra} if extra else out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        extra = state_dict.pop("normfuse", None)
        self.inner.load_state_dict(state_dict)
        if extra is not None:
            self.load_extra_state(extra)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)
