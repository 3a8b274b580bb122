"""What others see of a rewritten module: the signature, hints and docstring of the model's forward.

Trainers and generation helpers read ``inspect.signature(model.forward)``, some of them from the class,
so every model gets a class of its own. ``isinstance`` stays honest: such a class does not inherit from
the model's (its methods would then run half on the model, half on what replaces it), and it does not
pretend to (``fully_shard`` and parametrizations assign ``__class__``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import nn

#: What Python looks up on classes alone: containers of modules stay containers.
_CONTAINER = (
    *("__len__", "__getitem__", "__setitem__", "__delitem__"),
    *("__iter__", "__contains__"),
)


def resembling(base: type, model: type, forward: Callable | None = None) -> type:
    """A subclass of ``base`` whose ``forward`` reads like that of ``model``.

    Args:
        base: a module class with a ``forward(*args, **kwargs)``.
        model: the class of the model.
        forward: the model's forward if it is not its class's (bound, or an attribute of its own).
    """
    shown: Any = model.__dict__.get("forward") if forward is None else forward
    if shown is None:
        shown = getattr(model, "forward", None)
    if not callable(shown):
        return base
    inner: Any = base.forward  # type: ignore[attr-defined]
    # Dynamo counts recompilations, and gives up, per code object: models must not share one
    code = inner.__code__.replace()
    function = FunctionType(code, inner.__globals__, "forward", None, inner.__closure__)
    function.__kwdefaults__ = inner.__kwdefaults__
    of_instance = forward is not None and not isinstance(shown, MethodType)
    shown = getattr(shown, "__func__", shown)
    with contextlib.suppress(TypeError, ValueError):
        signature = inspect.signature(shown)
        functools.update_wrapper(function, shown, updated=())
        function.__signature__ = _with_self(signature) if of_instance else signature  # type: ignore[attr-defined]
    function.__qualname__ = f"Rewritten{model.__name__}.forward"
    members: dict[str, Any] = {
        "forward": function,
        "__doc__": model.__doc__,
        "__module__": base.__module__,
    }
    members.update({name: _passed_on(name) for name in _CONTAINER if hasattr(model, name)})
    return type(f"Rewritten{model.__name__}", (base,), members)


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    """The signature of an instance's own function as a function of its class would have it."""
    parameters = list(signature.parameters.values())
    kind = parameters[0].kind if parameters else inspect.Parameter.POSITIONAL_OR_KEYWORD
    if kind is not inspect.Parameter.POSITIONAL_ONLY:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    name = "self" if "self" not in signature.parameters else "_self"
    return signature.replace(parameters=[inspect.Parameter(name, kind), *parameters])


def _passed_on(name: str) -> Callable:
    def call(self: Any, *args: Any) -> Any:
        return getattr(self._source, name)(*args)

    call.__name__ = name
    return call


def address(model: type) -> tuple[str, str]:
    """Where a class is found again, if it is."""
    return model.__module__, model.__qualname__


def found(base: type[nn.Module], module: str, name: str) -> type[nn.Module]:
    """:func:`resembling` for the class at an :func:`address`; ``base`` if there is none any more."""
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
        return resembling(base, value)
    except Exception:  # whatever an import may raise: only the looks are lost
        return base
