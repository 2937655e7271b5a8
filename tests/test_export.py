"""Exported encoders, loaded by the target library alone in a process that cannot import hjepa."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hjepa
from hjepa import checkpoint
from hjepa.config import load_config
from hjepa.errors import ConfigError
from hjepa.use.export import TARGETS, export

# Rounding alone: the same weights in the same order of operations, except where another runtime multiplies.
TOLERANCE = {"timm": 1e-6, "hf": 1e-6, "safetensors": 1e-6, "torchscript": 1e-6, "onnx": 1e-5}

OWN = "encoder_type=vit", "patch_size=8", "embed_dim=32", "depth=3", "num_heads=2"
ROTARY = "rope.use_rope=true", "rope.theta=100.0"
ENCODERS = {
    "own": OWN,
    "layerscale": (*OWN, "use_layerscale=true", "layerscale_init=0.3", "use_flash_attention=false"),
    "rotary": (*OWN, *ROTARY),
    "rotary-layerscale": (*OWN, *ROTARY, "use_layerscale=true", "layerscale_init=0.3"),
    "named": ("encoder_type=vit_tiny_patch16_224", "patch_size=8"),
    "named-rotary": ("encoder_type=vit_tiny_patch16_224", "patch_size=8", "rope.use_rope=true"),
}

READ = {
    "timm": """
import timm
for path, out in jobs:
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["hjepa"])
    model = timm.create_model(**about["timm"], checkpoint_path=path, pretrained_cfg_overlay=about["image"]).eval()
    settings = timm.data.resolve_model_data_config(model)
    assert list(settings["input_size"]) == about["image"]["input_size"] and settings["crop_pct"] == 1.0
    assert list(settings["mean"]) == about["image"]["mean"] and list(settings["std"]) == about["image"]["std"]
    numpy.save(out, model(torch.from_numpy(images)).detach())
""",
    "safetensors": """
import timm
from safetensors.torch import load_file
for path, out in jobs:
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["hjepa"])
    model = timm.create_model(**about["timm"]).eval()
    model.load_state_dict(load_file(path))
    numpy.save(out, model(torch.from_numpy(images)).detach())
""",
    "hf": """
import timm
from transformers import AutoImageProcessor, AutoModel
for path, out in jobs:
    model = AutoModel.from_pretrained(path).eval()
    numpy.save(out, model(pixel_values=torch.from_numpy(images)).pooler_output.detach())
    of_timm = timm.create_model(f"local-dir:{path}", pretrained=True).eval()(torch.from_numpy(images))
    assert numpy.allclose(of_timm.detach(), numpy.load(out), atol=1e-6)
    photo = PIL.Image.open(path + ".png")
    numpy.save(out + ".photo.npy", AutoImageProcessor.from_pretrained(path)(photo).pixel_values)
""",
    "torchscript": """
for path, out in jobs:
    about = {"hjepa.json": ""}
    model = torch.jit.load(path, _extra_files=about)
    assert json.loads(about["hjepa.json"])["image"]["crop_mode"] == "center"
    assert torch.equal(model(torch.from_numpy(images[:1]))[0], model(torch.from_numpy(images))[0][:1])
    numpy.save(out, model(torch.from_numpy(images))[0].detach())
""",
    "onnx": """
import onnxruntime
for path, out in jobs:
    session = onnxruntime.InferenceSession(path)
    about = json.loads(session.get_modelmeta().custom_metadata_map["hjepa"])
    assert about["image"]["mean"] == [0.485, 0.456, 0.406]
    parts = [session.run(["pooled"], {"pixel_values": part})[0] for part in (images[:1], images[1:])]
    numpy.save(out, numpy.concatenate(parts))
""",
}
# What a reader may not lean on.
FORBIDDEN = {
    "timm": ("hjepa", "transformers", "onnxruntime"),
    "safetensors": ("hjepa", "transformers", "onnxruntime"),
    "hf": ("hjepa", "onnxruntime"),
    "torchscript": ("hjepa", "timm", "transformers"),
    "onnx": ("hjepa", "timm", "transformers", "torch"),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each kind of encoder, all of whose weights have moved away from where they started."""
    folder = tmp_path_factory.mktemp("encoders")
    for name, words in ENCODERS.items():
        config = load_config(None, [f"model.{word}" for word in words] + ["data.image_size=64"])
        model = hjepa.create_hjepa_from_config(config)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor += 0.05 * torch.randn(tensor.shape)
        saved = checkpoint.save(folder, 7, checkpoint.snapshot(model.state_dict()), {}, config.model_dump(mode="json"))
        saved.rename(folder / name)
    return folder


def elsewhere(to: str, jobs: Sequence[tuple[Path, Path]], images: Path) -> None:
    """Run the reader of a form in a process of its own."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in FORBIDDEN[to])
    needs = "import safetensors, torch\n" if "torch" not in FORBIDDEN[to] else ""
    paths = [(str(path), str(out)) for path, out in jobs]
    program = (
        f"import json, sys\n{blocked}import numpy, PIL.Image\n{needs}"
        "try:\n    import hjepa\nexcept ImportError:\n    pass\nelse:\n    sys.exit('hjepa was there')\n"
        f"jobs, images = {paths!r}, numpy.load({str(images)!r})\n{READ[to]}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=images.parent, capture_output=True, text=True, check=False, timeout=240,
        env={"PATH": "/usr/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(images.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def agree(to: str, names: Sequence[str], encoders: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    pixels = np.random.default_rng(1).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels).resize((210, 270), Image.Resampling.BICUBIC)
    jobs = []
    for name in names:
        path = tmp_path / f"{name}{next(iter(TARGETS[to].suffixes), '')}"
        export(encoders / name, to, path)
        photo.save(f"{path}.png")
        jobs.append((path, tmp_path / f"{name}.npy"))
    elsewhere(to, jobs, tmp_path / "images.npy")
    for name, (_, out) in zip(names, jobs, strict=True):
        encoder = hjepa.load(encoders / name)
        wanted = encoder(torch.from_numpy(images)).pooled.numpy()
        assert wanted.std() > 0.1
        np.testing.assert_allclose(np.load(out), wanted, rtol=0, atol=TOLERANCE[to], err_msg=name)
        if to == "hf":
            # The same square of the same image; it is filtered once there, and twice here.
            theirs = torch.from_numpy(np.load(f"{out}.photo.npy"))
            ours = encoder.preprocess(photo)
            assert (theirs - ours).abs().mean() < 0.02
            assert torch.cosine_similarity(encoder(theirs).pooled, encoder(ours).pooled).item() > 0.999


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_every_encoder_gives_the_same_embedding_elsewhere(to: str, encoders: Path, tmp_path: Path) -> None:
    agree(to, list(ENCODERS), encoders, tmp_path)


def test_onnx_gives_the_same_embedding_for_any_batch(encoders: Path, tmp_path: Path) -> None:
    agree("onnx", ["rotary-layerscale"], encoders, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "torchscript", "onnx"])
def test_so_does_every_other_form_of_every_encoder(to: str, encoders: Path, tmp_path: Path) -> None:
    agree(to, list(ENCODERS), encoders, tmp_path)


def test_the_online_encoder_is_another_one(encoders: Path, tmp_path: Path) -> None:
    for online in (False, True):
        export(encoders / "own", "safetensors", tmp_path / f"{online}.safetensors", online)
        written = load_file(tmp_path / f"{online}.safetensors")
        state = hjepa.load(encoders / "own", online=online).backbone.vit.state_dict()
        assert written.keys() == state.keys()
        assert all(torch.equal(written[name], state[name]) for name in state)
    images = torch.randn(1, 3, 64, 64)
    slow, fast = (hjepa.load(encoders / "own", online=online)(images).pooled for online in (False, True))
    assert not torch.allclose(slow, fast, atol=0.01)


def test_the_printed_lines_are_what_loads_it(
    encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    wanted = hjepa.load(encoders / "rotary")(images).pooled
    export(encoders / "rotary", "timm", Path("encoder.safetensors"))
    said = capsys.readouterr().out
    assert said.startswith("encoder.safetensors: the encoder of hjepa after step 7")
    names: dict[str, Any] = {}
    exec(said.partition("\n\n")[2], names)
    torch.testing.assert_close(names["model"](images), wanted, rtol=0, atol=1e-6)
    assert names["transform"](Image.new("RGB", (90, 70))).shape == (3, 64, 64)
    export(encoders / "rotary", "torchscript", Path("encoder.pt"))
    names = {"images": images}
    exec(capsys.readouterr().out.partition("\n\n")[2], names)
    torch.testing.assert_close(names["pooled"], wanted, rtol=0, atol=1e-6)
    assert json.loads(names["about"]["hjepa.json"])["run"]["step"] == 7


def test_the_card_says_what_was_measured_and_no_more(finished: Path, encoders: Path, tmp_path: Path) -> None:
    export(finished, "hf", tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    record = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"| this encoder | {record['eval/knn']:.1f} % | {record['eval/linear']:.1f} % |" in card
    assert f"| raw pixels | {record['eval/knn_pixels']:.1f} % |" in card
    assert hjepa.load(finished).origin.sha256 in card
    assert "# mine\n" in card
    shutil.copytree(finished, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ep')  # cut off by a kill: the lines before still count, as in the run's page
    export(tmp_path / "run", "hf", tmp_path / "cut")
    assert f"| this encoder | {record['eval/knn']:.1f} % |" in (tmp_path / "cut" / "README.md").read_text()
    export(encoders / "own", "hf", tmp_path / "other")
    assert "nothing is claimed" in (tmp_path / "other" / "README.md").read_text()


def test_refusals_are_one_line(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    for to, name, words in (
        ("pickle", "x.pkl", "--to pickle: there is no such form; choose timm, hf, onnx, torchscript, safetensors"),
        ("onnx", "x.pt", r"--to onnx writes \.onnx; choose the suffix"),
        ("timm", "x.pth", r"--to timm writes \.safetensors"),
        ("torchscript", "x", r"--to torchscript writes \.pt or \.ts"),
        ("hf", "there", "is there already"),
    ):
        with pytest.raises(ConfigError, match=words) as refused:
            export(finished, to, tmp_path / name)
        assert "\n" not in str(refused.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"onnx and onnxscript not installed; pip install 'hjepa\[export\]'"):
        export(finished, "onnx", tmp_path / "x.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
