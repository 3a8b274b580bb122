"""What a person reads: grouping, reasons, figures, the page."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from models import Transformer, ids, trained_like
from normfuse import Report, Site, explain
from normfuse.passes.report import PassRecord
from normfuse.runtime.render import (
    _family,
    duration,
    headline,
    quantity,
    reasons,
    rows,
    to_html,
    to_text,
)


def layered(layers=48, **facts):
    """A report as a deep model makes it: two norms a layer, one at the end."""
    report = Report(seconds=0.25, **facts)
    for i in range(layers):
        report.sites.append(
            Site(
                f"h.{i}.ln_1",
                "layer_norm",
                f"h.{i}.ln_1",
                "nn.LayerNorm",
                "pkg/model.py:10",
                "2×s0×64",
                "float32",
                applied=["fold_affine", "remove_mean"],
                bytes_saved=1000.0,
            )
        )
        report.sites.append(
            Site(
                f"h.{i}.ln_2",
                "layer_norm",
                f"h.{i}.ln_2",
                "nn.LayerNorm",
                "pkg/model.py:12",
                "2×s0×64",
                "float32",
                refused=[("fold_affine", f"no reader is linear [relu in h.{i}.act at m.py:3]")],
            )
        )
    report.sites.append(Site("ln_f", "layer_norm", "ln_f", "nn.LayerNorm", "pkg/model.py:20"))
    report.passes = [
        PassRecord("fold_affine", "exact", 0.02, layers, layers),
        PassRecord("merge_linears", "exact", disabled=True),
    ]
    return report


def test_repeated_layers_take_one_row_each():
    report = layered()
    assert [r.name for r in rows(report)] == ["h.0–47.ln_1", "h.0–47.ln_2", "ln_f"]
    assert [len(r.sites) for r in rows(report)] == [48, 48, 1]
    assert len(rows(report, full=True)) == 97
    text = to_text(report)
    assert len(text.splitlines()) < 40
    assert "h.0–47.ln_1" in text
    assert "h.31.ln_1" not in text
    assert "h.31.ln_1" in to_text(report, full=True)


def test_a_layer_with_another_fate_is_not_swallowed():
    report = layered(6)
    report.site("h.3.ln_1").applied = []
    report.site("h.3.ln_1").refused = [("fold_affine", "tied")]
    names = [r.name for r in rows(report)]
    assert "h.0–2,4,5.ln_1" in names
    assert "h.3.ln_1" in names
    assert headline(report) == "13 sites (13 layer_norm): 5 rewritten, 8 left as they were"


def test_different_shapes_and_kinds_stay_apart():
    report = Report(
        sites=[
            Site("a.0.n", "layer_norm", shape="2×8"),
            Site("a.1.n", "layer_norm", shape="2×16"),
            Site("a.2.n", "rms_norm", shape="2×16"),
        ]
    )
    assert len(rows(report)) == 3


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["norm"], "norm"),
        (["h.0.ln", "h.1.ln"], "h.0,1.ln"),
        (["h.0.ln", "h.1.ln", "h.2.ln", "h.9.ln"], "h.0–2,9.ln"),
        (["enc.0.x.3.n", "enc.1.x.3.n", "enc.2.x.3.n"], "enc.0–2.x.3.n"),
        (["0.norm", "1.norm", "2.norm"], "0–2.norm"),
        (["norm#0", "norm#1", "norm#2"], "norm#0–2"),
        (["h.0.ln#1", "h.0.ln#2", "h.1.ln#1", "h.1.ln#2"], "h.0,1.ln#1,2"),
        ([f"h.{i}.n" for i in range(0, 40, 2)], "h.*.n"),
    ],
)
def test_families(texts, expected):
    assert _family(texts) == expected


def test_numbers_that_are_no_layers_stay():
    # a version, a threshold, a line number and a name's own digits are not layers
    report = Report(sites=[Site("ln_1", "layer_norm"), Site("ln_2", "layer_norm")])
    report.sites[0].refused = [("p", "p=0.5 at model.py:10")]
    report.sites[1].refused = [("p", "p=0.1 at model.py:11")]
    assert len(rows(report)) == 2
    assert {r.text for r in reasons(report)} == {"p=0.5 at model.py:10", "p=0.1 at model.py:11"}


def test_reasons_are_listed_once_with_their_sites():
    report = layered()
    (reason,) = reasons(report)
    assert reason.pass_name == "fold_affine"
    assert len(reason.sites) == 48
    assert reason.text == "no reader is linear"
    assert reason.places == ["relu in h.0–47.act at m.py:3"]
    assert reason.where == "h.0–47.ln_2"
    text = to_text(report)
    assert text.count("no reader is linear") == 1
    assert "[1] fold_affine · 48 sites:" in text


def test_one_reason_at_several_places():
    report = Report(sites=[Site(f"h.{i}.n", "layer_norm") for i in range(3)])
    for i, place in enumerate(("[a in x at m.py:1]", "[a in x at m.py:1]", "[b in y at m.py:2]")):
        report.sites[i].refused = [("p", f"no such luck {place}")]
    (reason,) = reasons(report)
    assert reason.text == "no such luck"
    assert reason.places == ["a in x at m.py:1", "b in y at m.py:2"]
    assert len(rows(report)) == 1
    assert "a in x at m.py:1; b in y at m.py:2" in to_text(report)
    # brackets that are part of the sentence, and a place the sentence has named already
    report.sites[0].refused = [("p", "weights [a] and [b] differ")]
    report.sites[1].refused = [("p", "add in z at m.py:9 is in the way [add in z at m.py:9]")]
    found = reasons(report)
    assert [r.text for r in found][:2] == [
        "weights [a] and [b] differ",
        "add in z at m.py:9 is in the way",
    ]
    assert found[1].places == []


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_text_keeps_to_its_width_and_has_no_colours_unless_asked(width):
    report = layered()
    report.notes.append("a long sentence " * 20)
    text = to_text(report, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "\x1b" in to_text(report, width=width, color=True)


def test_text_tells_everything():
    report = layered(
        2,
        max_relative_error=3e-15,
        working_error={"eager": 2e-7, "rewritten": 3e-7},
        weight_bytes=1_500_000,
        mode="training",
        notes=["the head is tied"],
    )
    text = to_text(report)
    for part in (
        "training on cpu",
        "3.00e-15",
        "3.00e-07 (1.50× eager's)",
        "1.5 MB",
        "2 kB less memory traffic per call (predicted)",
        "switched off",
        "- the head is tied",
        "pkg/model.py:10",
    ):
        assert part in text, part
    assert "Verification failed" not in text
    report.failed_verification = True
    assert "Verification failed" in to_text(report)


def test_near_misses_are_not_counted_as_norms():
    report = Report(sites=[Site("n", "near_miss", refused=[("canonicalize", "eps outside")])])
    assert headline(report) == "1 near miss"
    report.sites.append(Site("m", "near_miss"))
    report.sites.append(Site("k", "rms_norm", applied=["p"]))
    assert headline(report) == (
        "1 site (1 rms_norm): 1 rewritten, 0 left as they were; 2 near misses"
    )


def test_empty_report():
    assert "no norms found" in to_text(Report())
    page = to_html(Report())
    assert "no norms found" in page
    assert 'id="sites"' not in page


def test_text_from_the_model_is_taken_literally():
    report = Report(sites=[Site("a[bold]b[/bold]", "layer_norm", spelling=":smile: [link=x]y")])
    text = to_text(report, width=140)
    assert "a[bold]b[/bold]" in text
    assert ":smile: [link=x]y" in text


def test_a_model_that_prints_its_own_report():
    model = trained_like(Transformer(layers=3)).eval()
    report = explain(model, (ids(),))
    text = str(report)
    assert "blocks.0–2.norm2" in text
    assert "models.py" in text
    assert text == to_text(report)


class Page(HTMLParser):
    """Well-formedness and what the page would load."""

    VOID = frozenset({"meta", "input", "br", "link", "img", "hr"})

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.links = [], [], []
        self.feed(text)
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [v for k, v in attrs if k in ("src", "href", "action")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, tag


def test_page_is_whole_and_self_contained(tmp_path):
    model = trained_like(Transformer(layers=2)).eval()
    report = explain(model, (ids(),), verify=True)
    path = tmp_path / "report.html"
    text = report.to_html(path)
    assert path.read_text(encoding="utf-8") == text
    page = Page(text)
    assert all(link.startswith("#") for link in page.links), page.links
    assert not re.search(r"@import|url\(", text)
    assert any(tag == "svg" for tag, _ in page.tags)
    assert sum(tag == "tr" for tag, _ in page.tags) >= len(report.sites)
    for s in report.sites:
        assert s.key in text


def test_script_in_names_cannot_run():
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>'
    report = Report(
        sites=[Site(evil, "layer_norm", evil, evil, evil, refused=[("p", evil)])],
        notes=[evil],
        streams=[{"name": evil, "text": "", "svg": f"<svg>{evil}</svg>"}],
    )
    text = to_html(report)
    policy = re.search(r'Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    assert "default-src 'none'" in policy
    # drawings are trusted to be SVG, but the policy admits one script only: ours, by its hash
    import base64
    import hashlib

    ours = re.search(r"<script>(\s*\"use strict\".*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(ours.encode()).digest()).decode()
    assert re.search(r"script-src ([^;]*)", policy)[1] == f"'sha256-{digest}'"
    before_drawing = text[: text.index("<svg>")]
    assert evil not in before_drawing


def test_quantities():
    assert quantity(0, "B") == "0 B"
    assert quantity(999, "B") == "999 B"
    assert quantity(12_345_678, "B") == "12.3 MB"
    assert quantity(-2000, "FLOP") == "-2 kFLOP"
    assert quantity(999_700, "B") == "1 MB"
    assert quantity(3e15, "B") == "3 PB"
    assert duration(3e-5) == "30 µs"
    assert duration(0.0123) == "12.3 ms"
    assert duration(0.9999) == "1 s"
    assert duration(72.0) == "72 s"


def test_round_trip_renders_the_same():
    report = layered(3)
    again = Report.from_dict(json.loads(report.to_json()))
    assert to_text(again) == to_text(report)
    assert to_html(again) == to_html(report)


def test_rendering_does_not_touch_the_report():
    report = layered(3)
    before = report.to_dict()
    to_text(report), to_html(report)
    assert report.to_dict() == before
    assert torch.is_grad_enabled()
