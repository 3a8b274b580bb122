"""What importing costs: the passes know torch, sympy and networkx only; nothing heavy comes unasked."""

import ast
import subprocess
import sys
from pathlib import Path

import normfuse

ALLOWED = {"torch", "sympy", "networkx", *sys.stdlib_module_names}
#: looked into only where the user has imported it: its cache objects become pytrees
GUESTS = {"capture.py": {"transformers"}}
FILES = sorted((Path(normfuse.__file__).parent / "passes").rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, 0) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def test_passes_import_torch_sympy_and_networkx_only():
    assert len(FILES) > 30
    room = Path(normfuse.__file__).parent / "passes"
    for path in FILES:
        depth = len(path.relative_to(room).parts)
        for name, level in imported(path):
            assert level <= depth, f"{path.name} imports {name} from outside of passes"
            known = ALLOWED | GUESTS.get(path.name, set())
            assert level or name.split(".")[0] in known, f"{path.name} imports {name}"


def test_importing_normfuse_imports_nothing_heavy():
    code = "import sys, normfuse; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in out.stdout.split()}
    assert "normfuse" in loaded and not loaded & {"triton", "matplotlib", "transformers"}
