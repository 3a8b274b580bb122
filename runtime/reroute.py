"""Methods of a model that call the model (``generate``) should meet its rewritten forward."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from types import MethodType
from typing import Any
from weakref import WeakMethod

from torch import nn

_NOTHING = object()


class Reroute:
    """Lets ``source(…)`` run another forward for as long as one of its methods runs.

    Args:
        source: the original model.
        forward: what runs instead of its own ``forward``; the module it is of is not kept alive.
    """

    def __init__(self, source: nn.Module, forward: MethodType) -> None:
        self._source, self._replacement = source, WeakMethod(forward)
        self._own: Any = _NOTHING  # a forward that the instance had, not its class
        self._lock = threading.Lock()
        self.depth = 0

    def method(self, name: str) -> Any:
        """The source's attribute of that name; its methods meet the other forward."""
        value = getattr(self._source, name)
        if not isinstance(value, MethodType) or value.__self__ is not self._source:
            return value

        @functools.wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._active():
                return value(*args, **kwargs)

        call.replacement = self._replacement()  # type: ignore[attr-defined]  # lives as long
        return call

    def original(self, args: Any, kwargs: Any) -> Any:
        """Call the source as it was written."""
        with self.aside():
            return self._source(*args, **kwargs)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """The source is as it was written, also inside one of its methods."""
        with self._lock:
            depth, self.depth = self.depth, 0
            if depth:
                self._put(self._own)
        try:
            yield
        finally:
            with self._lock:
                self.depth += depth
                if depth:
                    self._install()

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        with self._lock:
            self.depth += 1
            if self.depth == 1:
                self._install()
        try:
            yield
        finally:
            with self._lock:
                self.depth -= 1
                if self.depth == 0:
                    self._put(self._own)

    def _install(self) -> None:
        self._own = self._source.__dict__.get("forward", _NOTHING)
        # generation helpers read the signature
        self._source.__dict__["forward"] = functools.wraps(self._source.forward)(
            lambda *args, **kwargs: self._replacement()(*args, **kwargs)  # type: ignore[misc]
        )

    def _put(self, forward: Any) -> None:
        if forward is _NOTHING:
            self._source.__dict__.pop("forward", None)
        else:
            self._source.__dict__["forward"] = forward
