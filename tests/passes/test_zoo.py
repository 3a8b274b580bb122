"""Every norm of many architectures is found, none is invented, and the outputs stay the same.

The count is independent of graphs: forward hooks on the norm modules, and functional calls outside
them. ``NORMFUSE_ZOO=1`` also runs the architectures beyond the promised ones.
"""

from __future__ import annotations

import os
from collections import Counter

import normfuse
import pytest
import torch
import zoo
from normfuse.passes import ir
from normfuse.passes.capture import capture
from torch.utils import _pytree as pytree

pytest.importorskip("transformers")

PROMISED = [
    "gpt2",
    "opt",
    "bert",
    "llama",
    "qwen3",
    "gemma2",
    "gpt_neox",
    "phi",
    "bloom",
    "t5",
    "olmo2",
    "falcon",
    "mpt",
    "codegen",
    "starcoder2",
    "gpt_bigcode",
    "modernbert",
    "vit",
    "dinov2",
    "clip_vision",
    "convnext",
    "swin",
    "resnet",
]
OTHERS = [name for name in zoo.ARCHITECTURES if name not in PROMISED]
#: beyond the promised ones, always run: spellings the promised ones do not have
SAMPLED = ["cohere", "olmo", "vitdet", "deberta", "convnextv2"]
EVERYTHING = bool(os.environ.get("NORMFUSE_ZOO"))


def tensors(tree):
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", PROMISED + (OTHERS if EVERYTHING else SAMPLED))
def test_none_missed_none_invented(name):
    model, inputs = zoo.build(name)
    with torch.no_grad(), zoo.counted_norms(model) as expected:
        reference = model(**inputs)
    with torch.no_grad():
        gm = capture(model, (), inputs, dynamic=EVERYTHING)
        result = gm(**inputs)
    found = Counter({"row": len(ir.norm_nodes(gm))})
    found.update(s.kind for s in gm.meta["near_misses"])
    assert +found == expected, [s.refused for s in gm.meta["near_misses"]]
    before, after = tensors(reference), tensors(result)
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    keys = [n.meta["site"] for n in ir.norm_nodes(gm)]
    assert len(set(keys)) == len(keys)
    names = dict(model.named_modules())
    for node in ir.norm_nodes(gm):
        path, _, rest = node.meta["site"].partition("#")
        assert path in names or path.rpartition(".")[0] in {*names, ""}, node.meta["site"]
        assert not rest or rest.isdigit()


@pytest.mark.parametrize(
    ("name", "passes"),
    [(name, "exact") for name in PROMISED]
    + [(name, "rotation_ready") for name in ("gpt2", "gemma2", "t5", "swin")],
)
def test_rewritten_exactly(name, passes):
    model, inputs = zoo.build(name)
    with torch.no_grad():
        _, report = normfuse.rewrite(
            model, (), inputs, passes=passes, policy="always", verify=True, strict=True
        )
    assert report.applied and not report.failed_verification, report.notes
    assert report.max_relative_error <= 1e-10
