import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa.config import Config, dump_config, load_config
from hjepa.config.walk import leaves
from hjepa.errors import ConfigError


def refusal(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    assert refused.value.exit_code == 2
    return [line.removeprefix(f"{path}: ").removeprefix(f"{path}, ") for line in str(refused.value).splitlines()]


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", '"1e-5"', "0.00001", "1E-5"])
def test_a_number_is_the_same_in_all_spellings(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(f"model:\n  layerscale_init: {text}\n")
    assert load_config(tmp_path / "c.yaml").model.layerscale_init == 1e-5
    assert load_config(None, (f"model.layerscale_init={text}",)).model.layerscale_init == 1e-5


def test_all_mistakes_of_a_file_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    found = refusal(
        tmp_path,
        "training:\n  use_amp: 'no'\n  epochs: true\n  lr: -1\nmodel:\n  rope:\n    use_rop: true\ndatta: {}\n",
    )
    assert len(found) == 5
    assert any(line.startswith("training.use_amp (line 2): ") for line in found)
    assert any(line.startswith("training.epochs (line 3): ") for line in found)
    assert any(line.startswith("training.lr (line 4): input should be greater than 0, got -1") for line in found)
    assert "model.rope.use_rop (line 7): unknown key; did you mean model.rope.use_rope?" in found
    assert "datta (line 8): unknown key; did you mean data?" in found


EVERYTHING_WRONG = """\
training:
  epochs: 3
  epochs: 4
  learning_rate: 0.1
  use_amp: 'no'
  min_lr: 1.0
model:
  num_hierarchies: 3
loss:
  hierarchy_weights: [1.0]
data:
  image_size: 230
  datasets:
    - name: cifar10
      length: 5
    - name: cifer10
masking:
  mask_scale: [0.1, 1.0]
"""


def test_mistakes_of_every_kind_are_told_together_and_nothing_else(tmp_path: Path) -> None:
    found = refusal(tmp_path, EVERYTHING_WRONG)
    expected = [
        "line 3: training.epochs is given twice (first in line 2)",
        "training.learning_rate (line 4): unknown key; did you mean training.lr?",
        "training.use_amp (line 5): expected true, false or auto, got 'no'",
        "training.min_lr (line 6): 1 is above training.lr 0.0005; lower it",
        "loss.hierarchy_weights (line 10): 1 weights for 3 level(s) (model.num_hierarchies); give 3",
        "data.image_size (line 12): 230 is not a multiple of the patch size 16; use 224 or 240",
        "data.datasets[0].length (line 15): is for the procedural source shapes; cifar10 has as many images as it has",
        "masking.mask_scale (line 18): a block of the whole grid leaves nothing to see; at most 0.9, say",
    ]
    assert [
        line for line in found if not line.startswith("data.datasets[1].name (line 16): input should be")
    ] == sorted(expected, key=found.index)
    assert len(found) == len(expected) + 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        # The number of levels is wrong, so nothing is known of how many weights it takes.
        ("model: {num_hierarchies: x}\nloss: {hierarchy_weights: [1.0]}\n", ["model.num_hierarchies"]),
        ("model: {patch_size: 0}\ndata: {image_size: 230}\n", ["model.patch_size"]),
        ("training: {lr: -1, min_lr: 3}\n", ["training.lr"]),
        ("training: {epochs: 0, warmup_epochs: 7}\n", ["training.epochs"]),
        ("masking: {num_masks: 4.5, mask_scale: [0.001, 0.002]}\n", ["masking.num_masks"]),
        ("model: {encoder_type: vit, patch_size: x, embed_dim: 64}\n", ["model.patch_size"]),
        ("data: {datasets: [{name: nothing, length: 3}]}\n", ["data.datasets[0].name"]),
        # One of two conflicts stands on a conflict's key: it is told once the other is mended.
        ("model: {num_hierarchies: 3, depth: 5, target_layers: [3, 9]}\n", ["model.depth"]),
    ],
)
def test_a_conflict_that_touches_a_wrong_key_is_not_told(tmp_path: Path, text: str, told: list[str]) -> None:
    assert [line.split(" (line ")[0] for line in refusal(tmp_path, text)] == told


def test_a_conflict_stands_at_its_first_key(tmp_path: Path) -> None:
    (line,) = refusal(
        tmp_path,
        "model:\n  encoder_type: vit\n  num_heads: 8\n  embed_dim: 100\n  depth: 2\n  patch_size: 16\n"
        "  predictor: {embed_dim: 48}\n",
    )
    assert line == "model.embed_dim (line 4): 100 is not a multiple of num_heads 8; try num_heads=10"
    (line,) = refusal(tmp_path, "model:\n  rope:\n    use_rope: true\n  pretrained: true\n")
    assert line.startswith("model.rope.use_rope (line 3): excluded by pretrained: ")
    (line,) = refusal(tmp_path, "data:\n  datasets:\n    - name: shapes\n    - name: folder\n")
    assert line == "data.datasets[1].path: folder needs a path"  # it stands nowhere


def test_a_named_encoder_keeps_its_shape_and_one_of_ones_own_is_given_in_full(tmp_path: Path) -> None:
    named = load_config(None, ("model.encoder_type=vit_tiny_patch16_224", "model.embed_dim=192", "model.patch_size=8"))
    assert vars(named.model.shape) == {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 8}
    own = {"patch_size": 8, "embed_dim": 64, "depth": 5, "num_heads": 4}
    given = ["model.encoder_type=vit", *(f"model.{name}={value}" for name, value in own.items())]
    assert vars(load_config(None, given).model.shape) == own
    for name in own:
        (line,) = refusal(tmp_path, "", *(text for text in given if name not in text))
        assert line.endswith(f"vit has no shape of its own; give {name}")
    for name, value in (("embed_dim", 384), ("depth", 5), ("num_heads", 4)):
        (line,) = refusal(tmp_path, f"model: {{encoder_type: vit_tiny_patch16_224, {name}: {value}}}\n")
        assert line.startswith(f"model.{name} (line 1): {value} is not vit_tiny_patch16_224's ")
    together = refusal(tmp_path, "model:\n  embed_dim: 100\n  depth: 5\n  num_heads: 4\n")
    assert [line.split(":")[0] for line in together] == [
        "model.embed_dim (line 2)",
        "model.depth (line 3)",
        "model.num_heads (line 4)",
    ]


OWN = ("model.encoder_type=vit", "model.patch_size=16", "model.depth=4")
CROPS = ("data.multicrop.num_local_crops=2", "loss.type=sigreg")


def assert_accepted_with(overrides: tuple[str, ...], taken: list[str]) -> None:
    names = {text.partition("=")[0] for text in taken}
    load_config(None, [text for text in overrides if text.partition("=")[0] not in names] + taken)


def offers(line: str) -> list[str]:
    """The overrides that a message offers, as key=value or as a number for the key itself."""
    _, key, message = line.split(": ", 2)
    offer = re.split("; |nearest: ", message, maxsplit=1)[1]
    written = re.findall(r"([a-z_][a-z_.]*)=(\[[^\]]*\]|[^\s,]+)", offer)
    if written:
        # A bare name is of the key's section or of one around it.
        known = [leaf.key for leaf in leaves()]
        around = ["", *(key[: dot.end()] for dot in re.finditer(r"\.", key))]
        return [f"{next(s for s in reversed(around) if s + name in known)}{name}={value}" for name, value in written]
    return [f"{key}={value}" for value in re.findall(r"(?:try|use|at most|last is) (\d+)", offer)][:1]


@pytest.mark.parametrize(
    "overrides",
    [
        (*OWN, "model.embed_dim=96", "model.num_heads=7"),
        (*OWN, "model.embed_dim=100", "model.num_heads=7"),
        (*OWN, "model.embed_dim=60", "model.num_heads=10", "model.rope.use_rope=true"),
        (*OWN, "model.embed_dim=33", "model.num_heads=3", "model.rope.use_rope=true"),
        (*OWN, "model.embed_dim=30", "model.num_heads=4", "model.rope.use_rope=true"),
        ("model.predictor.num_heads=7",),
        ("model.predictor.embed_dim=30",),
        ("model.predictor.embed_dim=2",),
        ("model.predictor.num_heads=7", "model.predictor.embed_dim=30"),
        ("data.image_size=230",),
        ("data.batch_size=10", "training.accumulation_steps=4"),
        ("data.batch_size=1", "loss.type=sigreg"),
        ("data.batch_size=4", "loss.type=combined", "training.accumulation_steps=4"),
        ("data.batch_size=3", "loss.type=combined", "training.accumulation_steps=4"),
        ("data.global_batch_size=8",),
        ("loss.hierarchy_weights=[0,0]",),
        ("loss.hierarchy_weights=[0,0]", "loss.type=sigreg"),
        ("masking.num_masks=0",),
        ("data.multicrop.num_local_crops=2",),
        (*CROPS, "data.multicrop.local_crop_size=90"),
        (*CROPS, "data.multicrop.local_crop_size=9"),
        ("masking.mask_scale=[0.001,0.002]",),
        ("data.image_size=1024", "masking.mask_scale=[0.0001,0.0002]", "model.num_hierarchies=1"),
        ("training.epochs=3", "training.warmup_epochs=3"),
    ],
    ids=" ".join,
)
def test_a_value_that_is_offered_is_accepted(overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides)
    taken = [offer for line in str(refused.value).splitlines() for offer in offers(line)]
    assert taken, refused.value
    assert_accepted_with(overrides, taken)


@pytest.mark.parametrize(
    ("overrides", "words", "taken"),
    [
        (("model.embed_dim=100",), "leave it out", ["model.embed_dim=null"]),
        (("model.pretrained=true", "model.rope.use_rope=true"), "set it to false", ["model.rope.use_rope=false"]),
        (("model.pretrained=true", "model.use_layerscale=true"), "set it to false", ["model.use_layerscale=false"]),
        (("model.target_layers=[3,13]",), "the last is 12", ["model.target_layers=[3,12]"]),
        (("data.image_size=230",), "use 224 or 240", ["data.image_size=240"]),
        (("data.global_batch_size=8",), "set data.global_batch_size=null", ["data.global_batch_size=null"]),
        (
            ("data.batch_size=auto", "training.accumulation_steps=2"),
            "leave it out",
            ["training.accumulation_steps=1"],
        ),
        (("loss.predict_every=2",), "set it to 1", ["loss.predict_every=1"]),
        (("loss.predict_every=2", "loss.type=sigreg"), "use 1, or data.num_views=2", ["data.num_views=2"]),
        (("loss.hierarchy_weights=[1.0]",), "give 2", ["loss.hierarchy_weights=[1.0,1.0]"]),
        (("masking.num_masks=0",), "use 1 or more", ["masking.num_masks=1"]),
        (
            ("masking.num_masks=0", "loss.type=sigreg", "data.num_views=2"),
            "or set loss.hierarchy_weights to zeros",
            ["loss.hierarchy_weights=[0,0]"],
        ),
        (
            (
                "training.use_gradient_checkpointing=predictor",
                "loss.hierarchy_weights=[0,0]",
                "loss.type=sigreg",
                "data.num_views=2",
            ),
            "no predictor to recompute; use encoder",
            ["training.use_gradient_checkpointing=encoder"],
        ),
        (("data.multicrop.num_local_crops=2",), "or 0 local crops", ["data.multicrop.num_local_crops=0"]),
        (
            (*CROPS, "data.multicrop.local_crop_size=240"),
            "240 is more than the 224 of a whole view; use at most that",
            ["data.multicrop.local_crop_size=224"],
        ),
        (("masking.mask_scale=[0.2,1.0]",), "at most 0.9, say", ["masking.mask_scale=[0.2,0.9]"]),
        (("training.epochs=null",), "set training.max_time, such as 8h", ["training.max_time=8h"]),
        (("training.lr=1e-7",), "training.min_lr: 1e-06 is above training.lr 1e-07; lower", ["training.min_lr=1e-7"]),
        (("training.warmup_lr=1",), "training.warmup_lr: 1 is above", ["training.warmup_lr=5e-4"]),
        (("data.datasets=[{name: folder}]",), "needs a path", ["data.datasets=[{name: folder, path: x}]"]),
        (("data.datasets=[{name: cifar10, length: 3}]",), "is for", ["data.datasets=[{name: shapes, length: 3}]"]),
    ],
)
def test_what_is_offered_in_words_is_accepted(overrides: tuple[str, ...], words: str, taken: list[str]) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(None, overrides)
    assert_accepted_with(overrides, taken)


def test_an_override_is_named_as_the_place_and_not_the_file(tmp_path: Path) -> None:
    text = "data:\n  datasets:\n    - name: shapes\n      weight: 2\nmodel:\n  depth: 12\n"
    for override, key in (
        ("training.lr=-1", "training.lr"),
        ("data.datasets.0.weight=-1", "data.datasets[0].weight"),
        ("data.datasets=[{name: cifar10, length: 5}]", "data.datasets[0].length"),
        ("model={embed_dim: 3}", "model.embed_dim"),
    ):
        assert [line.split(": ")[:2] for line in refusal(tmp_path, text, override)] == [["command line", key]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  epochs: 1\n  epochs: 2\n", "training.epochs is given twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("- 1\n", "expected sections"),
        ("training: [\n", "line 2"),
        ("x: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("training:\n  lr: .nan\n", "finite"),
        ("training:\n  lr: .inf\n", "finite"),
        ("training:\n  epochs: 10.5\n", "integer"),
        ("evaluation:\n  linear: 1\n", "boolean"),
        ("training:\n  use_amp: 1\n", "expected true, false or auto, got 1"),
        ("training:\n  lr: true\n", "boolean"),
        ("1: 2\n", "plain word"),
        ("masking:\n  mask_scale: [0.3, 0.1]\n", r"write \[0.1, 0.3\]"),
        ("data:\n  datasets: []\n", "at least 1"),
        ("data:\n  datasets: [{name: folder}]\n", "needs a path"),
        ("data:\n  datasets: [{name: cifar10, split: unlabeled}]\n", "exists for stl10 only"),
        ("model: {encoder_type: vit, patch_size: 16, depth: 4, embed_dim: 100, num_heads: 7}\n", "num_heads=5"),
        (
            "model: {encoder_type: vit, patch_size: 16, depth: 4, embed_dim: 60,\n num_heads: 10, "
            "rope: {use_rope: true}}\n",
            "multiple of 4",
        ),
        ("loss:\n  hierarchy_weights: [1.0]\n", "1 weights for 2 level"),
        ("training:\n  epochs: 3\n  warmup_epochs: 3\n", "at most 2"),
        ("training:\n  accumulation_steps: 3\n", "use 66"),
        ("model:\n  target_layers: [3, 13]\n", "names block 13 of 12"),
        ("data:\n  image_size: 230\n", "use 224 or 240"),
        ("evaluation:\n  linear_l2: []\n", "at least 1"),
        (
            "model: {num_hierarchies: 3}\ndata: {image_size: 32, num_views: 2}\nmasking: {num_masks: 0}\n"
            "loss: {type: sigreg, hierarchy_weights: [0, 0, 0]}\n",
            "3 levels need a grid of 4 x 4 patches, and an image has 2 x 2; use at most 2",
        ),
        ("data: {batch_size: auto, global_batch_size: 1}\nloss: {type: sigreg}\n", "use at least 2"),
        ("device: gpu\n", "device"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    found = refusal(tmp_path, text)
    assert any(re.search(message, line) for line in found), found


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "big.yaml").write_text("#" * 1_000_001)
    with pytest.raises(ConfigError, match="no config; the limit"):
        load_config(tmp_path / "big.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "deep.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    "text", ["training.epochs", "=3", "training..epochs=3", "training.epochs=[", "data.datasets.9.name=x"]
)
def test_overrides_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(None, (text,))


def test_an_override_takes_the_place_of_the_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, "training:\n  epochs: 3\n", "training.epochs=x")[0].startswith(
        "command line: training.epochs: "
    )


def test_a_path_is_a_whole_config() -> None:
    (dataset,) = load_config(None, ("data=./photos",)).data.datasets
    assert (dataset.name, dataset.path) == ("folder", "./photos")


def test_a_folder_in_the_place_of_a_recipes_images_keeps_how_they_are_shown(recipes: list[Path]) -> None:
    for recipe in recipes:
        own, named = load_config(recipe).data, load_config(recipe, ("data=./photos",)).data
        (dataset,) = named.datasets
        assert (dataset.name, dataset.path) == ("folder", "./photos")
        assert named.model_copy(update={"datasets": own.datasets}) == own
    (first,) = load_config(recipes[0], ("data=./photos", "data.image_size=64", "data=./other")).data.datasets
    assert first.path == "./other"


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    config = load_config(None, ("model.layerscale_init=1e-5", "data=./photos", "training.clip_grad=null"))
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


@settings(max_examples=300, deadline=None)
@given(
    key=st.sampled_from([leaf.key for leaf in leaves() if "[]" not in leaf.key]),
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 300),
        st.floats(),
        st.text(max_size=5),
        st.lists(st.floats(0, 2), max_size=3),
    ),
)
def test_any_value_is_accepted_or_refused_by_name(key: str, value: object) -> None:
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    try:
        config = load_config(None, (f"{key}={text}",))
    except ConfigError:
        return
    assert load_config(None, (f"{key}={text}",)) == config
