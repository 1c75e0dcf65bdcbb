"""Where a torch module to export comes from: a factory in the user's code, or a local Hugging Face directory."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qonnx.errors import DependencyError, ExportError
from qonnx.exporter.inputs import require_torch
from qonnx.graph import first_line

if TYPE_CHECKING:
    import torch

# What is exported: the module, its example inputs, and the names of its dynamic dimensions.
Source = tuple["torch.nn.Module", tuple[Any, ...] | dict[str, Any], Mapping[str, Any] | Sequence[Any] | None]

# The examples: two, so that no dimension has size one, and short, so that the export is quick.
BATCH, SEQUENCE, SAMPLES = 2, 16, 4000

# What the second axis of an input counts, where it may change.
AXIS_1 = {
    "input_ids": "sequence",
    "attention_mask": "sequence",
    "token_type_ids": "sequence",
    "decoder_input_ids": "decoder_sequence",
    "input_values": "samples",
}


def load_factory(spec: str) -> Source:
    """Calls `PACKAGE.MODULE:FACTORY`; modules in the current directory are found.

    The factory takes no arguments and returns `(module, args)` or `(module, args, dynamic_shapes)`, as `export` takes
    them.

    Raises:
        ExportError: there is no such factory, it fails, or it returns something else.
        DependencyError: torch is not installed.
    """
    require_torch()
    import torch

    name, _, attribute = spec.partition(":")
    if not name or not attribute:
        raise ExportError(f"{spec!r} is not PACKAGE.MODULE:FACTORY; for example mypackage.models:build")
    with _importable(os.getcwd()):
        try:
            factory = getattr(importlib.import_module(name), attribute, None)
        except (Exception, SystemExit) as error:  # the user's module may raise anything
            raise ExportError(
                f"{spec}: {name} cannot be imported: {type(error).__name__}: {first_line(error)}; "
                "run from the folder that holds it"
            ) from error
        if not callable(factory):
            raise ExportError(f"{spec}: {name} has no function {attribute!r}; check the spelling")
        try:
            made = factory()
        except (Exception, SystemExit) as error:
            raise ExportError(f"{spec} failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], torch.nn.Module):
        raise ExportError(f"{spec} must return (module, args) or (module, args, dynamic_shapes)")
    return made[0], made[1], made[2] if len(made) == 3 else None


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def load_huggingface(directory: str | os.PathLike[str]) -> Source:
    """Loads a local Hugging Face model directory, and makes example inputs from its configuration.

    The class is the one that `config.json` names under `architectures`, else the base model. Weights are loaded as
    float32, which every later step can run on a CPU, and attention in its elementary form (MatMul, Softmax, MatMul),
    which can be quantized. Nothing is fetched, and no code from the directory runs.

    Text models get `input_ids`, `attention_mask` (one row padded) and, if they tell segments apart, `token_type_ids`;
    batch and sequence are dynamic. Image models get `pixel_values`, with an axis for frames if they look at videos; the
    batch is dynamic. Audio models get `input_values`; batch and samples are dynamic. Those that read a spectrogram of a
    fixed length, as Whisper does, get `input_features`; the batch is dynamic. Encoders with a decoder get
    `decoder_input_ids`, too.

    Raises:
        ExportError: the directory holds no model that transformers can load, weights are missing, or the model takes
            none of these.
        DependencyError: transformers is not installed.
    """
    require_torch()
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            "a Hugging Face directory needs transformers: pip install 'qonnx-pipeline[hf]'"
        ) from error
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ExportError(f"{directory}: no config.json in it, so it is not a Hugging Face model directory")
    with _silent(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            module, missing = _load_weights(transformers, config, directory)
        except ExportError:
            raise
        except Exception as error:  # transformers raises many types for a damaged or unknown model
            raise ExportError(f"{directory} cannot be loaded: {first_line(error)}") from error
    if missing:
        raise ExportError(
            f"{directory}: {len(missing)} weights of {type(module).__name__} are missing, {missing[0]} for one; "
            "load the class you mean in a factory and export that"
        )
    try:
        args, dynamic_shapes = _example(module, config, directory)
    except AttributeError as error:
        raise ExportError(f"{directory}: no example inputs can be made: {error}; use a factory") from error
    return module, args, dynamic_shapes


def _load_weights(transformers: Any, config: Any, directory: Path) -> tuple[torch.nn.Module, list[str]]:
    import torch

    architecture = (config.architectures or [None])[0]
    kind = getattr(transformers, architecture, None) if architecture else transformers.AutoModel
    if kind is None:
        raise ExportError(f"{directory}: transformers has no class {architecture!r}; load it in a factory")
    if hasattr(config, "use_cache"):
        config.use_cache = False  # past keys and values are for generation, step by step
    config.get_text_config()._experts_implementation = "batched_mm"  # the usual one is no operator of ONNX
    module, info = kind.from_pretrained(
        directory,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    return module.eval(), sorted(info["missing_keys"])


def _example(module: torch.nn.Module, config: Any, directory: Path) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    accepted = inspect.signature(module.forward).parameters
    inputs: dict[str, Any] = {}
    if "input_ids" in accepted:
        inputs.update(_text(config))
    if "pixel_values" in accepted:
        inputs["pixel_values"] = _image(config)
    if "input_values" in accepted:
        inputs["input_values"] = _noise(BATCH, SAMPLES)
    if "input_features" in accepted and hasattr(config, "max_source_positions"):
        inputs["input_features"] = _noise(BATCH, config.num_mel_bins, 2 * config.max_source_positions)  # halved inside
        if "input_ids" not in accepted and getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = _text(config)["decoder_input_ids"]
    inputs = {name: value for name, value in inputs.items() if name in accepted}
    if not inputs:
        main = getattr(module, "main_input_name", "unknown inputs")
        raise ExportError(f"{directory}: no example inputs are known for a model that takes {main!r}; use a factory")
    return inputs, {name: {0: "batch"} | ({1: AXIS_1[name]} if name in AXIS_1 else {}) for name in inputs}


def _text(config: Any) -> dict[str, torch.Tensor]:
    import torch

    config = config.get_text_config()
    length = min(SEQUENCE, getattr(config, "max_position_embeddings", SEQUENCE))
    padding = getattr(config, "pad_token_id", None)
    ids = torch.randint(config.vocab_size, (BATCH, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, length - length // 4 :] = 0
    if padding is not None and 0 <= padding < config.vocab_size:
        ids[ids == padding] = (padding + 1) % config.vocab_size
        ids[mask == 0] = padding
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = (torch.arange(length) >= length // 2).long().repeat(BATCH, 1)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, : length // 2].clone()
    return inputs


def _image(config: Any) -> torch.Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    patched = hasattr(config, "patch_size") or hasattr(config, "tubelet_size")  # Perceiver has frames, and reads images
    frames = [config.num_frames] if hasattr(config, "num_frames") and patched else []
    return _noise(BATCH, *frames, getattr(config, "num_channels", 3), height, width)


def _noise(*shape: int) -> torch.Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bars and load reports."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
