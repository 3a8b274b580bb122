"""Errors and refusals. A refusal is a normal answer; an error is the caller's or our mistake."""

from __future__ import annotations


class NormfuseError(RuntimeError):
    """Base class of every error raised by normfuse."""


class NormfuseWarning(UserWarning):
    """A rewrite is right as asked, and has a consequence worth knowing."""


class CaptureError(NormfuseError):
    """The model could not be turned into one pre-dispatch ATen graph; says what and where."""


class Unsupported(CaptureError):
    """The graph holds something normfuse does not look into; leaving it alone is right."""


class SpecError(NormfuseError):
    """A graph violates the IR specification (a bug in a pass, never the user's fault)."""


class VerificationError(NormfuseError):
    """A rewritten graph disagrees with the original beyond the stated tolerance."""


class Refuse(Exception):
    """Raised while planning a site's rewrite: the rewrite is not exact, not possible or not worth it.

    Args:
        reason: one sentence a person can act on, naming the failed precondition.
        node: the graph node that fails it, if there is one; its module path and ``file:line`` are
            appended to the reported reason.
    """

    def __init__(self, reason: str, node: object | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
