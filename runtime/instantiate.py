"""From what a user types to a model and inputs: ``pkg.module:factory``, ``2x128:int64``, ``gpt2``."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..passes.errors import NormfuseError

_INPUT = re.compile(
    r"^(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>(?:\d+(?:x\d+)*)?)"
    r":(?P<dtype>[a-z]\w*)(?:<(?P<bound>\d+))?$"
)
_SHORT = {"int": "int64", "long": "int64", "float": "float32", "half": "float16"}

#: Sizes for architectures built from their configuration class: big enough that every layer is
#: there, small enough that nobody waits. Only attributes a configuration has are set.
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "hidden_size": 64,
    "d_model": 64,
    "intermediate_size": 128,
    "d_ff": 128,
    "ffn_dim": 128,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_attention_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "query_pre_attn_scalar": 16,
    "rotary_dim": 8,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "vocab_size": 256,
    "image_size": 32,
    "patch_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 64,
}


def load_target(target: str) -> Any:
    """The object ``pkg.module:attribute`` or ``path/to/file.py:attribute`` names."""
    place, colon, attribute = target.rpartition(":")
    if not colon or not place or not attribute:
        raise NormfuseError(
            f"{target!r} does not name a model: write package.module:factory or file.py:factory"
        )
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise NormfuseError(f"there is no file {place}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # classes must be picklable
        spec.loader.exec_module(module)
    else:
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name != place and not place.startswith(f"{error.name}."):
                raise
            raise NormfuseError(f"there is no module {place!r} (missing: {error.name})") from error
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise NormfuseError(f"{place} has no {attribute!r}")
        value = getattr(value, part)
    return value


def load_model(target: str) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """The model, and the example inputs its factory gives with it, if any.

    The target is a module, or a callable without arguments that returns a module,
    ``(module, args)`` or ``(module, args, kwargs)``.
    """
    value = load_target(target)
    args: Any = ()
    kwargs: Any = {}
    if not isinstance(value, nn.Module):
        if not callable(value):
            raise NormfuseError(f"{target} is a {type(value).__name__}, not a module or a factory")
        try:
            value = value()
        except TypeError as error:
            raise NormfuseError(f"{target} must be callable without arguments: {error}") from error
        if isinstance(value, tuple) and 2 <= len(value) <= 3:
            value, args, kwargs = (*value, {})[:3]
        if isinstance(args, torch.Tensor):
            args = (args,)
    if not isinstance(value, nn.Module):
        raise NormfuseError(f"{target} gave a {type(value).__name__}, not an nn.Module")
    return value, tuple(args), dict(kwargs)


def parse_input(text: str, bound: int) -> tuple[str | None, Any]:
    """One ``--input``: ``[name=]2x128:int64[<bound]`` or ``name=literal``.

    Args:
        bound: integers are drawn below it unless the text says otherwise.

    Returns:
        ``(keyword or None, value)``.
    """
    match = _INPUT.match(text)
    if match is None:
        name, equals, literal = text.partition("=")
        try:
            if equals and name.isidentifier():
                return name, ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            pass
        raise NormfuseError(
            f"cannot read input {text!r}: write 2x128:int64, name=2x128:float32, "
            "2x128:int64<50257 (values below 50257) or name=False"
        )
    shape = tuple(int(n) for n in match["shape"].split("x") if n)
    dtype = getattr(torch, _SHORT.get(match["dtype"], match["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise NormfuseError(f"unknown dtype {match['dtype']!r} in input {text!r}")
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return match["name"], torch.ones(shape, dtype=dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        high = int(match["bound"] or bound)
        return match["name"], torch.randint(0, high, shape, generator=generator).to(dtype)
    return match["name"], torch.randn(shape, generator=generator).to(dtype)


def parse_inputs(texts: Sequence[str], model: nn.Module) -> tuple[tuple, dict[str, Any]]:
    """Example inputs from the command line. Integers are legal in every embedding of the model."""
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    pairs = [parse_input(t, min(sizes, default=2)) for t in texts]
    args = tuple(v for name, v in pairs if name is None)
    return args, {name: v for name, v in pairs if name is not None}


def from_transformers(name: str) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """A small random model of a ``transformers`` architecture, with inputs. Downloads nothing."""
    try:
        import transformers
        from transformers.models.auto import configuration_auto, modeling_auto
    except ImportError as error:
        raise NormfuseError("this needs transformers: pip install 'normfuse[models]'") from error
    known = configuration_auto.CONFIG_MAPPING
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, list(known), n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise NormfuseError(f"transformers has no architecture {name!r}{hint}")
    config = known[name](**_special_tokens())
    _shrink(config)
    # with the head it was made for: bidirectional encoders are listed as causal models too
    families = ["MaskedLM", "CausalLM", "ImageClassification", ""]
    families.insert(0 if getattr(config, "is_encoder_decoder", False) else 2, "Seq2SeqLM")
    for family in families:
        auto = getattr(modeling_auto, f"AutoModelFor{family}" if family else "AutoModel", None)
        if auto is None or type(config) not in auto._model_mapping:
            continue
        torch.manual_seed(0)
        model = auto.from_config(config)
        return (model.eval(), (), _inputs(model, config))
    raise NormfuseError(
        f"transformers {transformers.__version__} has no model class for {name!r} that can be "
        "built from its configuration alone"
    )


def _special_tokens() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _shrink(config: Any) -> None:
    scalars: dict[str, Any]
    lists = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_heads": [2, 4]}
    if isinstance(getattr(config, "depths", None), (list, tuple)):
        for key, value in lists.items():
            if isinstance(getattr(config, key, None), (list, tuple)):
                setattr(config, key, value)
        for key, size in (("embed_dim", 16), ("num_stages", 2), ("window_size", 4)):
            if hasattr(config, key):
                setattr(config, key, size)
        if hasattr(config, "stage_names"):
            config.stage_names = ["stem", "stage1", "stage2"]
            config._out_features, config._out_indices = ["stage2"], [2]
        scalars = {"image_size": 32, "patch_size": 2 if hasattr(config, "patch_size") else None}
    else:
        scalars = SMALL
    known: set[str] = set(config.to_dict()) | set(getattr(config, "attribute_map", {}))
    for key, value in scalars.items():
        old = getattr(config, key, None) if key in known else None
        if isinstance(old, int) and not isinstance(old, bool) and value is not None:
            setattr(config, key, value)
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(getattr(config, "layer_types", None), list) and layers:
        config.layer_types = config.layer_types[:layers]
    for key in getattr(config, "sub_configs", {}):
        if getattr(config, key, None) is not None:
            _shrink(getattr(config, key))


def _inputs(model: nn.Module, config: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", None) or 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        return {main: torch.randn(2, channels, height, width, generator=generator)}
    if main != "input_ids":
        raise NormfuseError(
            f"{type(model).__name__} takes {main!r}: write a factory that returns the model with "
            "example inputs and name it as module.path:factory"
        )
    vocabulary = getattr(config.get_text_config(), "vocab_size", 256)
    ids = torch.randint(3, vocabulary, (2, 16), generator=generator)
    inputs = {main: ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :8]
    return inputs
