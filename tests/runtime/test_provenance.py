"""What other processes are told: structured traces, keys of compile caches, reports on cache hits."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from torch import nn
from normfuse.runtime import backend
if sys.argv[1] == "changed":
    backend.source_hash = lambda: "of other sources"
torch.manual_seed(0)
model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)).eval()
with torch.no_grad():
    fast = torch.compile(model, backend="normfuse",
                         options={"passes": ["fold_affine"], "policy": "always", "strict": True})
    x = torch.randn(4, 8)
    torch.testing.assert_close(fast(x), model(x))
from torch._dynamo.utils import counters
[report] = backend.reports()
print("HITS", counters["inductor"]["fxgraph_cache_hit"])
print("APPLIED", report.applied)
"""


def run(tmp_path, variant="same", **env):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), **env}
    out = subprocess.run(
        [sys.executable, str(script), variant], capture_output=True, text=True, env=env
    )
    assert out.returncode == 0, out.stderr
    lines = dict(line.split(maxsplit=1) for line in out.stdout.splitlines() if line.strip())
    assert lines["APPLIED"] == "[('0', 'fold_affine')]"  # also where the compiled code was found
    return int(lines["HITS"])


def test_other_sources_never_find_compiled_code_and_reports_do_not_depend_on_it(tmp_path):
    assert run(tmp_path) == 0
    assert run(tmp_path) >= 1
    # the same graph, from other sources
    assert run(tmp_path, "changed") == 0
    assert run(tmp_path, "changed") >= 1


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Names and payloads of what a compile wrote to ``TORCH_TRACE``."""
    path = tmp_path_factory.mktemp("trace")
    trace = path / "trace"
    run(path, TORCH_TRACE=str(trace))
    found, current = {}, None
    for log in Path(trace).iterdir():
        for line in log.read_text().splitlines():
            if line.startswith("\t"):
                if current is not None:
                    found[current].append(line[1:])
                continue
            _, _, record = line.partition("] ")
            artifact = json.loads(record).get("artifact") if record.startswith("{") else None
            current = artifact["name"] if artifact else None
            if current is not None:
                found[current] = []
    return {name: "\n".join(lines) for name, lines in found.items()}


def test_the_structured_trace_has_both_graphs_and_the_report(artifacts):
    assert "normfuse.rms_norm" in artifacts["normfuse_before"]
    after = artifacts["normfuse_after"]
    assert "def forward" in after and "normfuse.rms_norm" not in after
    report = json.loads(artifacts["normfuse_report"])
    [site] = [s for s in report["sites"] if s["applied"]]
    assert (site["key"], site["kind"], site["applied"]) == ("0", "rms_norm", ["fold_affine"])
