"""The encoder of a run in the forms that other libraries read, each without hjepa.

Every one of our encoders is a model of timm's: a name and arguments reproduce it, and the weights keep timm's names.
What is exported takes normalised images `[B, 3, S, S]` float32 and gives the mean of the final tokens, `[B, D]`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from hjepa.config.geometry import OWN_SHAPE
from hjepa.config.model import Model
from hjepa.console import Console
from hjepa.errors import ConfigError, StorageError
from hjepa.use.card import card
from hjepa.use.frozen import Encoder, load

_KEY = "hjepa"
# Of timm's names the one without defaults that cannot be undone by arguments (None counts as not given).
_ROTARY = "eva_giant_patch14_224"
_OWN = "vit_tiny_patch16_224"


@dataclass(frozen=True)
class Target:
    """A form of export.

    Attributes:
        suffixes: of the file; none for a folder.
        needs: libraries that write it, beyond those that hjepa needs itself.
        write: makes it, and says in Python how it is read.
    """

    suffixes: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[[Encoder, Path, Path], str]


def export(run: Path, to: str, output: Path, online: bool = False) -> None:
    """Write the encoder of a run or of a checkpoint for another library, and say how it is read there.

    Args:
        run: folder of a run or of a checkpoint.
        to: a key of `TARGETS`.
        output: a file, or a folder for `hf`; it must not be there yet.
        online: the context encoder in place of its slow average.

    Raises:
        ConfigError: for an unknown form or another's suffix, a library that is missing, an output that is there.
        StorageError: when the disk refuses, or the run has no intact checkpoint.
    """
    target = TARGETS.get(to)
    if target is None:
        raise ConfigError(f"--to {to}: there is no such form; choose {', '.join(TARGETS)}")
    if output.suffix not in target.suffixes and target.suffixes:
        raise ConfigError(f"{output}: --to {to} writes {' or '.join(target.suffixes)}; choose the suffix")
    missing = [name for name in target.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--to {to}: {' and '.join(missing)} not installed; pip install 'hjepa[export]'")
    if output.exists():
        raise ConfigError(f"{output}: is there already; remove it, or choose another")
    console = Console()
    encoder = load(run, online, console.warn)
    temporary = output.with_name(f".{output.name}.tmp{output.suffix}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        advice = target.write(encoder, temporary, output)
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{output}: could not be written ({reason})") from error
    finally:
        _remove(temporary)
    average = "the context encoder" if encoder.origin.online else "the encoder"
    console.say(f"{output}: {average} of {encoder.origin.run} after step {encoder.origin.step}\n\n{advice}")


def timm_model(model: Model, image_size: int) -> tuple[str, dict[str, Any]]:
    """timm's name of an encoder and the arguments that make `timm.create_model` build it exactly."""
    shape = model.shape
    rotary, own = model.rope.use_rope, model.encoder_type == OWN_SHAPE
    arguments: dict[str, Any] = {
        "img_size": image_size,
        "patch_size": shape.patch_size,
        "num_classes": 0,
        "global_pool": "avg",
        "class_token": False,
    }
    if rotary or own:
        arguments |= {"embed_dim": shape.embed_dim, "depth": shape.depth, "num_heads": shape.num_heads}
    if model.use_layerscale:
        arguments["init_values"] = model.layerscale_init
    if not rotary:
        return (_OWN if own else model.encoder_type), arguments | {"fc_norm": False}
    return _ROTARY, arguments | {
        "mlp_ratio": 4.0,
        "attn_type": "rope",
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_temperature": model.rope.theta,
        "use_post_transformer_norm": True,
        "use_fc_norm": False,
    }


def image_settings(encoder: Encoder) -> dict[str, Any]:
    """What has to be done to an image, in timm's words: its shorter side resized to S, the square in the middle."""
    size = encoder.image_size
    return {
        "input_size": [3, size, size],
        "mean": list(encoder.preprocess.mean),
        "std": list(encoder.preprocess.std),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def description(encoder: Encoder) -> dict[str, Any]:
    """All that goes with the weights, as plain data."""
    name, arguments = timm_model(encoder.model, encoder.image_size)
    origin = encoder.origin
    return {
        "timm": {"model_name": name, **arguments},
        "image": image_settings(encoder),
        "run": {"name": origin.run, "step": origin.step, "online": origin.online, "sha256": origin.sha256},
    }


class Embedding(nn.Module):
    """Images `[B, 3, S, S]` -> the pooled embedding `[B, D]` and the tokens `[B, N, D]`; what is traced."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.vit = encoder.backbone.vit

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        tokens = self.vit.forward_features(pixel_values)
        return tokens.mean(dim=1), tokens


def _weights(encoder: Encoder) -> dict[str, Tensor]:
    state: dict[str, Tensor] = encoder.backbone.vit.state_dict()
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _save_weights(encoder: Encoder, path: Path) -> None:
    # Libraries that read safetensors ask for this word of the metadata.
    save_file(_weights(encoder), path, {"format": "pt", _KEY: json.dumps(description(encoder))})


def _timm(encoder: Encoder, path: Path, output: Path) -> str:
    _save_weights(encoder, path)
    name, arguments = timm_model(encoder.model, encoder.image_size)
    arguments |= {"pretrained_cfg_overlay": image_settings(encoder)}
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return (
        f"import timm\nmodel = timm.create_model({name!r}, checkpoint_path={str(output)!r}, {given}).eval()\n"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    )


def _safetensors(encoder: Encoder, path: Path, output: Path) -> str:
    _save_weights(encoder, path)
    return (
        f"import json, safetensors\nwith safetensors.safe_open({str(output)!r}, 'pt') as file:\n"
        f"    about = json.loads(file.metadata()[{_KEY!r}])  # timm's name and arguments, mean, std, size\n"
        "    state = {key: file.get_tensor(key) for key in file.keys()}"
    )


def _hf(encoder: Encoder, path: Path, output: Path) -> str:
    path.mkdir()
    _save_weights(encoder, path / "model.safetensors")
    name, arguments = timm_model(encoder.model, encoder.image_size)
    # The form of timm's own models on the hub, which both libraries read; the image processor reads it, too.
    config = {
        "architecture": name,
        "model_type": "timm_wrapper",
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "global_pool": "avg",
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {**image_settings(encoder), "fixed_input_size": True, "num_classes": 0},
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (path / "README.md").write_text(card(encoder, output.name), encoding="utf-8")
    return (
        "from transformers import AutoImageProcessor, AutoModel\n"
        f"processor = AutoImageProcessor.from_pretrained({str(output)!r})\n"
        f"model = AutoModel.from_pretrained({str(output)!r}).eval()  # pooler_output [B, {encoder.embed_dim}]"
    )


def _onnx(encoder: Encoder, path: Path, output: Path) -> str:
    example = torch.zeros(2, 3, encoder.image_size, encoder.image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own insides
        program = torch.onnx.export(
            Embedding(encoder).eval(),
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=["pooled", "tokens"],
            dynamic_shapes={"pixel_values": {0: "batch"}},
        )
    assert program is not None
    program.model.metadata_props[_KEY] = json.dumps(description(encoder))
    program.save(path)
    return (
        f"import onnxruntime\nsession = onnxruntime.InferenceSession({str(output)!r})\n"
        "(pooled,) = session.run(['pooled'], {'pixel_values': images})  # float32 "
        f"[B, 3, {encoder.image_size}, {encoder.image_size}], normalised\n"
        f"about = session.get_modelmeta().custom_metadata_map[{_KEY!r}]  # mean, std, size as JSON"
    )


def _torchscript(encoder: Encoder, path: Path, output: Path) -> str:
    example = torch.zeros(2, 3, encoder.image_size, encoder.image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants to be rid of it; who asks for it has a reason
        traced = torch.jit.trace(Embedding(encoder).eval(), example, check_trace=False)
        buffer = io.BytesIO()  # on a full disk torch ends in an error of its own
        torch.jit.save(traced, buffer, _extra_files={f"{_KEY}.json": json.dumps(description(encoder))})
    path.write_bytes(buffer.getvalue())
    return (
        f"import torch\nabout = {{'{_KEY}.json': ''}}  # mean, std, size as JSON, once it is loaded\n"
        f"model = torch.jit.load({str(output)!r}, _extra_files=about)\n"
        "pooled, tokens = model(images)  # float32 "
        f"[B, 3, {encoder.image_size}, {encoder.image_size}], normalised"
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


TARGETS = {
    "timm": Target((".safetensors",), (), _timm),
    "hf": Target((), (), _hf),
    "onnx": Target((".onnx",), ("onnx", "onnxscript"), _onnx),
    "torchscript": Target((".pt", ".ts"), (), _torchscript),
    "safetensors": Target((".safetensors",), (), _safetensors),
}
