"""Starting from weights on the disk: those of other libraries in their own layouts, and those of a run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from hjepa.assess.assess import assess
from hjepa.assess.request import Request
from hjepa.build import create_hjepa_from_config
from hjepa.config import load_config
from hjepa.errors import ConfigError, StorageError
from hjepa.evaluate import evaluate_run
from hjepa.model.hjepa import HJEPA
from hjepa.train import train

SHAPE = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "num_classes": 0}


def donor(**options: Any) -> VisionTransformer:
    """A small ViT of timm's, its weights far from those of a new model."""
    torch.manual_seed(1)
    vit = VisionTransformer(**(SHAPE | {"img_size": 64} | options))
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return vit


def started(small: tuple[str, ...], path: Path, *words: str) -> HJEPA:
    return create_hjepa_from_config(load_config(None, [*small, f"model.pretrained={path}", *words])).eval()


def embedding(model: HJEPA, images: torch.Tensor) -> torch.Tensor:
    return model.embed(images)["last"]


def of_timm(vit: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Mean of the final tokens of patches."""
    with torch.no_grad():
        return vit.eval().forward_features(images)[:, vit.num_prefix_tokens :].mean(dim=1)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_a_timm_file_gives_timms_embedding(small: tuple[str, ...], tmp_path: Path, images: torch.Tensor) -> None:
    vit = donor(class_token=False, global_pool="avg", fc_norm=False)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in vit.state_dict().items()}}, tmp_path / "vit.pth")
    for name in ("vit.safetensors", "vit.pth"):
        model = started(small, tmp_path / name)
        torch.testing.assert_close(embedding(model, images), of_timm(vit, images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.embed(images, online=True)["last"], embedding(model, images))


def test_a_classifier_leaves_its_class_token_and_head_behind(small: tuple[str, ...], tmp_path: Path) -> None:
    vit = donor(num_classes=10)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    mine = started(small, tmp_path / "vit.safetensors").context_encoder.backbone.vit
    assert torch.equal(mine.pos_embed, vit.pos_embed[:, 1:])
    assert torch.equal(mine.blocks[2].mlp.fc1.weight, vit.blocks[2].mlp.fc1.weight)
    pooled = donor(num_classes=10, class_token=False, global_pool="avg")  # its last norm is called fc_norm
    save_file(pooled.state_dict(), tmp_path / "pooled.safetensors")
    assert torch.equal(
        started(small, tmp_path / "pooled.safetensors").context_encoder.backbone.vit.norm.weight, pooled.fc_norm.weight
    )


def test_ijepas_layout_gives_its_target_encoder(small: tuple[str, ...], tmp_path: Path, images: torch.Tensor) -> None:
    """As its train.py saves it: three modules wrapped by DistributedDataParallel beside the optimizer's state."""
    target = donor(class_token=False, global_pool="avg", fc_norm=False)
    wrapped = {f"module.{name}": value for name, value in target.state_dict().items()}
    other = {name: torch.zeros_like(value) for name, value in wrapped.items()}
    predictor = {"module.predictor_embed.weight": torch.zeros(4, 4)}
    saved = {"encoder": other, "predictor": predictor, "target_encoder": wrapped, "opt": {"state": {}}, "scaler": None}
    torch.save(
        saved | {"epoch": 3, "loss": 0.1, "batch_size": 8, "world_size": 1, "lr": 1e-3}, tmp_path / "jepa.pth.tar"
    )
    model = started(small, tmp_path / "jepa.pth.tar")
    torch.testing.assert_close(embedding(model, images), of_timm(target, images), rtol=1e-4, atol=1e-4)
    del saved["target_encoder"]
    torch.save(saved, tmp_path / "half.pth.tar")
    assert float(embedding(started(small, tmp_path / "half.pth.tar"), images).abs().sum()) == 0


def test_positions_and_patches_take_the_models_size(small: tuple[str, ...], tmp_path: Path) -> None:
    vit = donor()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    words = ("model.patch_size=16", "data.image_size=96", "model.num_hierarchies=1", "masking.num_masks=1")
    mine = started(small, tmp_path / "vit.safetensors", *words).context_encoder.backbone.vit
    vit.set_input_size((96, 96), (16, 16))
    assert mine.pos_embed.shape == (1, 36, 32)
    torch.testing.assert_close(mine.patch_embed.proj.weight, vit.patch_embed.proj.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine.pos_embed, vit.pos_embed[:, 1:], rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_from_another_whose_folder_may_then_go(
    small: tuple[str, ...], tmp_path: Path, images: torch.Tensor
) -> None:
    words = [*small, "training.epochs=1", "data.datasets=[{name: shapes, length: 16}]", "evaluation.eval_frequency=0"]
    train(load_config(None, [*words, f"experiment.output_dir={tmp_path / 'first'}"]))
    first = started(small, tmp_path / "first")
    again = started(small, tmp_path / "first" / "checkpoints" / "step-00000002")
    torch.testing.assert_close(embedding(first, images), embedding(again, images))
    assert not torch.equal(
        embedding(first, images), embedding(create_hjepa_from_config(load_config(None, [*small])), images)
    )
    more = [*words, f"experiment.output_dir={tmp_path / 'second'}", f"model.pretrained={tmp_path / 'first'}"]
    train(load_config(None, [*more, "training.max_steps=1"]))
    shutil.rmtree(tmp_path / "first")
    train(load_config(None, more), resume=True)
    assert (tmp_path / "second" / "checkpoints" / "step-00000002").is_dir()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"embed_dim": 64}, r"blocks.0.attn.proj.bias is of shape \[64\] there and of shape \[32\] in this model"),
        ({"depth": 2}, "blocks.2.attn.proj.bias is missing there"),
        ({"init_values": 0.1}, "blocks.0.ls1.gamma is of shape .* there and missing in this model"),
    ],
)
def test_another_shape_is_refused_by_name(
    small: tuple[str, ...], tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    save_file(
        donor(class_token=False, global_pool="avg", fc_norm=False, **options).state_dict(), tmp_path / "a.safetensors"
    )
    with pytest.raises(ConfigError, match=rf"^model\.pretrained: .*a\.safetensors: .*{said}"):
        started(small, tmp_path / "a.safetensors")


def test_what_is_no_file_of_weights_is_one_line(small: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("missing.pth", "no such file or folder"),
        ("text.pth", "no file of weights"),
        ("text.safetensors", "no file of weights"),
        ("other.pth", "holds no vision transformer"),
        ("empty", "no checkpoint here"),
    ):
        with pytest.raises((ConfigError, StorageError), match=said) as caught:
            started(small, tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1


def test_nothing_in_a_file_is_executed(small: tuple[str, ...], tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"patch_embed.proj.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ConfigError, match="no file of weights"):
        started(small, tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_path_is_refused_with_what_it_excludes(small: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"model\.whiten_patches: excluded by pretrained"):
        load_config(None, [*small, "model.pretrained=vit.pth", "model.whiten_patches=true"])
    with pytest.raises(ConfigError, match=r"expected true, false, or the path"):
        load_config(None, [*small, "model.pretrained=3"])


def test_the_baselines_of_a_continued_run_need_no_file(
    small: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Untrained means random weights; what training started from is a row of its own while it can be read."""
    save_file(donor(class_token=False, global_pool="avg", fc_norm=False).state_dict(), tmp_path / "vit.safetensors")
    words = [*small, "training.max_steps=2", "evaluation.linear=false", "evaluation.dense=false"]
    from_file = (f"model.pretrained={tmp_path / 'vit.safetensors'}", f"experiment.output_dir={tmp_path / 'run'}")
    results = train(load_config(None, [*words, *from_file]))
    assert "at the start (pretrained)" in capsys.readouterr().out
    alone = train(load_config(None, [*words, f"experiment.output_dir={tmp_path / 'alone'}"]))
    for name in ("eval/knn_random", "eval/knn_pixels"):
        assert results[name] == alone[name]
    assert "eval/knn_start" in results.keys() - alone.keys()

    quick = Request(tmp_path / "run", probes=("knn", "rankme"), features=("last",))
    figures = assess(quick).values
    assert figures["eval/knn_start"] == results["eval/knn_start"]
    assert abs(figures["eval/rankme_start"] - figures["eval/rankme_random"]) > 0.1

    (tmp_path / "vit.safetensors").unlink()
    (note,) = assess(quick).notes
    assert "cannot be read any more" in note
    again = evaluate_run(tmp_path / "run", [])
    assert again == {name: value for name, value in results.items() if not name.endswith("_start")}
    more = train(load_config(None, [*words, "training.max_steps=3", *from_file]), resume=True)
    assert more["eval/knn_random"] == results["eval/knn_random"]
