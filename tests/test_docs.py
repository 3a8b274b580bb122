"""The pages say what the code does: options, passes, links, commands, measured sections."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from normfuse.passes.contract import FUEL_ENV
from normfuse.passes.manager import DISABLE_ENV, registry
from normfuse.passes.presets import PRESETS
from normfuse.runtime.options import Options

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_exact_pass_and_preset_is_described():
    page = read("docs/exact.md")
    for name, cls in registry().items():
        if cls.promise == "exact":
            assert f"`{name}`" in page, name
    for preset in PRESETS:
        assert f'`"{preset}"`' in page, preset
    assert DISABLE_ENV in page
    assert FUEL_ENV in page


def test_every_option_of_the_backend_is_described_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", read("docs/backend.md"), re.M))
    own = {f.name: getattr(Options(), f.name) for f in fields(Options) if f.name != "inductor"}
    assert set(rows) == set(own)
    for name, default in own.items():
        if name == "max_folded_bytes":
            assert rows[name] == f"{default >> 30} GiB"
        else:
            assert eval(rows[name].strip("`")) == default, name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link
    for file in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.\w+)`", text):
        assert (ROOT / file).exists(), file


def test_commands_of_the_readme_name_what_exists():
    text = read("README.md")
    commands = re.findall(r"^(?:pip|python|normfuse|pytest) .*$", text, re.M)
    assert any("-e . " in c for c in commands)
    assert any("'.[test]'" in c for c in commands)
    for command in commands:
        for script in re.findall(r"[\w/]+\.(?:py|txt)", command):
            assert (ROOT / script).is_file(), command


def test_no_number_is_out_of_date():
    out = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "render_tables.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
