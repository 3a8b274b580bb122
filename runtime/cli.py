"""The command line: ``normfuse explain``, ``normfuse doctor``, ``normfuse bench``.

Heavy imports (torch, transformers) happen inside the commands, so that ``--help`` is instant.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Normalization as a compiler problem: see, explain and measure the rewrites of a model.",
)

Target = Annotated[
    str | None,
    typer.Argument(
        help="package.module:name or file.py:name of a module, or of a function without arguments "
        "that returns a module, (module, args) or (module, args, kwargs).",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        help="Example input, repeatable: 2x128:int64, 2x128:int64<50257 (values below), "
        "name=2x128:float32, name=False.",
        show_default=False,
    ),
]
Transformers = Annotated[
    str | None,
    typer.Option(
        "--transformers",
        help="Architecture name (gpt2, llama…): a small random model from its configuration class; "
        "downloads nothing.",
        show_default=False,
    ),
]
Passes = Annotated[
    str, typer.Option(help="A preset (exact, canonical, rotation_ready) or names, comma-separated.")
]
Training = Annotated[bool, typer.Option("--training", help="Train mode instead of eval mode.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Convert the model and its float inputs, e.g. bfloat16.", show_default=False),
]


@contextmanager
def _errors() -> Iterator[None]:
    """A user's mistake is one line on stderr and exit code 2, not a traceback."""
    from ..passes.errors import NormfuseError

    try:
        yield
    except NormfuseError as error:
        typer.echo(f"normfuse: {error}", err=True)
        raise typer.Exit(2) from error


def _load(
    target: str | None,
    inputs: list[str] | None,
    transformers: str | None,
    training: bool,
    dtype: str | None,
) -> tuple[nn.Module, tuple, dict[str, Any]]:
    import torch
    from torch.utils import _pytree as pytree

    from ..passes.errors import NormfuseError
    from .instantiate import from_transformers, load_model, parse_inputs

    if (target is None) == (transformers is None):
        raise NormfuseError("name either a target (module.path:factory) or --transformers NAME")
    if transformers is not None:
        model, args, kwargs = from_transformers(transformers)
    else:
        assert target is not None
        model, args, kwargs = load_model(target)
    if inputs:
        args, kwargs = parse_inputs(inputs, model)
    if not args and not kwargs:
        raise NormfuseError(
            "no example inputs: pass --input 2x128:int64, or let the factory return (module, args)"
        )
    model.train(training)
    if dtype is not None:
        wanted = getattr(torch, dtype, None)
        if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
            raise NormfuseError(f"{dtype!r} is not a floating-point dtype")
        model.to(wanted)

        def convert(t: Any) -> Any:
            return t.to(wanted) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

        args, kwargs = pytree.tree_map(convert, (args, kwargs))
    return model, args, kwargs


def _pass_list(text: str) -> str | list[str]:
    return [p.strip() for p in text.split(",") if p.strip()] if "," in text else text


@app.command()
def explain(
    target: Target = None,
    inputs: Inputs = None,
    transformers: Transformers = None,
    passes: Passes = "exact",
    training: Training = False,
    dtype: Dtype = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the model: compare in float64 after every pass.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="One row per site, repeated layers too.")
    ] = False,
    streams: Annotated[bool, typer.Option("--streams", help="Draw the residual streams.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write a self-contained page.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Which norms a model has, what would be rewritten, what is refused and why."""
    with _errors():
        import torch

        from .render import to_text
        from .rewrite import explain as explain_model

        model, args, kwargs = _load(target, inputs, transformers, training, dtype)
        with torch.set_grad_enabled(training):
            report = explain_model(model, args, kwargs, passes=_pass_list(passes), verify=verify)
        if html is not None:
            report.to_html(html)
        if as_json:
            typer.echo(report.to_json())
            return
        terminal = sys.stdout.isatty()
        typer.echo(to_text(report, full=full, width=_width(terminal), color=terminal))
        if streams:
            for drawing in report.streams:
                typer.echo(f"\n{drawing['text']}")
        if html is not None:
            typer.echo(f"\nwrote {html}")


@app.command()
def doctor(
    trial: Annotated[
        bool, typer.Option("--trial", help="Also compile and run a small model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    clear: Annotated[
        bool, typer.Option("--clear", help="First forget tuned kernel plans and failures.")
    ] = False,
) -> None:
    """What is installed, and what normfuse will use of it. Exit code 1 if something is wrong."""
    from . import autotune_cache
    from .doctor import examine

    if clear:
        autotune_cache.clear()
    diagnosis = examine(trial)
    if as_json:
        typer.echo(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        _print_diagnosis(diagnosis)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _print_diagnosis(diagnosis: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    console = Console(width=_width(terminal), highlight=False, markup=False, emoji=False)
    marks = {True: ("ok", "green"), False: ("wrong", "red"), None: ("–", "dim")}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    for f in diagnosis.findings:
        table.add_row(f.what, Text(*marks[f.ok]), f.state, Text(f.advice, "dim"))
    console.print(table)
    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("pass", "promise", "in presets", ""):
        table.add_column(name, overflow="fold")
    for p in diagnosis.passes:
        presets = ", ".join(p["presets"]) or "on request"
        what = p["what"] if p["on"] else f"switched off. {p['what']}"
        table.add_row(p["name"], p["promise"], presets, what, style="" if p["on"] else "dim")
    console.print(table)


@app.command()
def bench(
    target: Target = None,
    inputs: Inputs = None,
    transformers: Transformers = None,
    passes: Passes = "exact",
    training: Training = False,
    dtype: Dtype = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Time one model in eager mode, under Inductor and under normfuse, side by side."""
    with _errors():
        model, args, kwargs = _load(target, inputs, transformers, training, dtype)
        result = _bench(model, args, kwargs, _pass_list(passes), training, rounds)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from .render import duration

    where = result["environment"]
    typer.echo(f"{where['device']} · torch {where['torch']} · {result['rounds']} rounds")
    for name, entry in result["variants"].items():
        line = f"  {name:<9} {duration(entry['median']):>9}"
        if name in result["over_inductor"]:
            r = result["over_inductor"][name]
            line += f"   {r['value']:.2f}× Inductor  [{r['low']:.2f}, {r['high']:.2f}]"
        typer.echo(line)
    typer.echo(f"  {result['rewritten']} of {result['sites']} sites rewritten")


def _bench(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    passes: str | list[str],
    training: bool,
    rounds: int,
) -> dict[str, Any]:
    from dataclasses import asdict

    import torch
    from torch.utils import _pytree as pytree
    from tqdm import tqdm

    from . import backend, measure

    def call(f: Any) -> Any:
        def forward() -> Any:
            with torch.no_grad():
                return f(*args, **kwargs)

        def step() -> Any:
            model.zero_grad(set_to_none=True)
            leaves = pytree.tree_leaves(f(*args, **kwargs))
            tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
            sum(t.float().mean() for t in tensors).backward()

        return step if training else forward

    backend.clear_reports()
    functions = {
        "eager": model,
        "inductor": torch.compile(model),
        "normfuse": torch.compile(model, backend="normfuse", options={"passes": passes}),
    }
    with tqdm(total=rounds, disable=not sys.stderr.isatty(), leave=False) as bar:
        times = measure.interleaved(
            {name: call(f) for name, f in functions.items()}, rounds, on_round=bar.update
        )
    sites = [s for r in backend.reports() for s in r.sites]
    return {
        "environment": measure.environment(),
        "rounds": rounds,
        "variants": {n: t.to_dict() for n, t in measure.timings(times).items()},
        "over_inductor": {
            name: asdict(measure.paired_ratio(times["inductor"], times[name]))
            for name in ("eager", "normfuse")
        },
        "sites": len(sites),
        "rewritten": sum(bool(s.applied) for s in sites),
    }


def _width(terminal: bool) -> int:
    import shutil

    return max(60, min(160, shutil.get_terminal_size((100, 24)).columns)) if terminal else 100


if __name__ == "__main__":
    app()
