"""Files of features: what is in them, who made them, and how they are written and read a part at a time."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hjepa.errors import ConfigError, DataError
from hjepa.use.frozen import Origin

SUFFIXES = (".parquet", ".npy", ".safetensors")

_KEY = "hjepa"
_BLOCK = 4096

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Header(Origin):
    """What a file of features says of itself, beside its encoder's origin; two files of one header have the same rows.

    Attributes:
        kind: `pooled`, or `level<l>`.
        shape: of an image's features: `[D]`, or `[N, D]` with all tokens.
        images: the folder, or the words of the config that name the source.
        listing: sha256 over the names, sizes and times of the files.
    """

    kind: str
    shape: list[int]
    images: str
    listing: str

    def differences(self, other: Header) -> str:
        """Where another one differs, in words; a checkpoint that was moved is the same."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return "; ".join(
            "other files in the folder" if name == "listing" else f"{name}: {there}, now {here}"
            for name, there, here in pairs
            if there != here and name not in ("checkpoint", "sha256" if self.step != other.step else "")
        )


class Rows(NamedTuple):
    """Some images in a row.

    Attributes:
        files: their names.
        features: `[m, *shape]` float32.
        labels: `[m]` int64, or None.
    """

    files: Sequence[str]
    features: Float32
    labels: NDArray[np.int64] | None


def check_suffix(path: Path) -> None:
    """Refuse a file that cannot be written or read here, before hours are spent.

    Raises:
        ConfigError: for an unknown suffix, or where pyarrow is missing.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: features are kept as {', '.join(SUFFIXES)}; choose one by the suffix")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            f"{path}: pyarrow is not installed; pip install 'hjepa[parquet]', or choose .npy or .safetensors"
        )


def write(path: Path, suffix: str, header: Header, count: int, parts: Iterable[Rows]) -> None:
    """Write a file of `count` rows, holding one part in memory at a time.

    A `.npy` file has room for the features alone; the names lie in `<path>.json`.
    """
    shape = (count, *header.shape)
    if suffix == ".parquet":
        _write_parquet(path, header, parts)
        return
    scratch = path.with_name(f"{path.name}.scratch")
    features = np.lib.format.open_memmap(path if suffix == ".npy" else scratch, "w+", np.float32, shape)
    files: list[str] = []
    labels: list[NDArray[np.int64]] = []
    for rows in parts:
        features[len(files) : len(files) + len(rows.files)] = rows.features
        files += rows.files
        labels += [] if rows.labels is None else [rows.labels]
    features.flush()
    if suffix == ".npy":
        text = {_KEY: asdict(header), "files": files}
        text |= {"labels": np.concatenate(labels).tolist()} if labels else {}
        sidecar(path).write_text(json.dumps(text))
        return
    # The header of the format is limited to 100 MB and read at every opening, so that names lie beside the features.
    names = np.frombuffer(json.dumps(files).encode(), np.uint8).copy()
    tensors = {"features": torch.from_numpy(features), "files": torch.from_numpy(names)}
    tensors |= {"labels": torch.from_numpy(np.concatenate(labels))} if labels else {}
    save_file(tensors, path, {_KEY: json.dumps(asdict(header))})
    scratch.unlink()


def sidecar(path: Path) -> Path:
    """Where the names of a `.npy` file lie."""
    return path.with_name(f"{path.name}.json")


def _write_parquet(path: Path, header: Header, parts: Iterable[Rows]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kind = pa.float32()
    for length in reversed(header.shape):
        kind = pa.list_(kind, length)
    writer = None
    try:
        for rows in parts:
            columns = [pa.array([_utf8(name) for name in rows.files], pa.string())]
            names = ["file"]
            if rows.labels is not None:
                columns.append(pa.array(rows.labels, pa.int64()))
                names.append("label")
            values = pa.array(np.ascontiguousarray(rows.features).reshape(-1))
            for length in reversed(header.shape):
                values = pa.FixedSizeListArray.from_arrays(values, length)
            table = pa.Table.from_arrays([*columns, values], [*names, "features"])
            table = table.replace_schema_metadata({_KEY: json.dumps(asdict(header))})
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _utf8(name: str) -> str:
    """A file's name may be any bytes, a string in parquet may not."""
    return name.encode("utf-8", "backslashreplace").decode()


class FeatureFile:
    """A file of features that is there.

    Attributes:
        path: of the file.
        header: see `Header`.
        files: names of the images, one per row.

    Raises:
        ConfigError: see `check_suffix`.
        DataError: when it is missing, damaged, or nobody's that `hjepa embed` made.
    """

    def __init__(self, path: Path) -> None:
        check_suffix(path)
        self.path = path
        try:
            header, self.files = self._open()
            self.header = Header(**header)
        except FileNotFoundError as error:
            raise DataError(f"{error.filename or path}: no such file; hjepa embed makes it") from None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: not a file of features made by hjepa embed ({reason})") from None

    def blocks(self) -> Iterator[Float32]:
        """All features in order, `[m, *shape]` float32 at a time."""
        if self.path.suffix == ".parquet":
            from pyarrow import parquet

            for batch in parquet.ParquetFile(self.path).iter_batches(_BLOCK, columns=["features"]):
                values = batch.column(0)
                for _ in self.header.shape:
                    values = values.flatten()
                yield values.to_numpy(zero_copy_only=False).reshape(-1, *self.header.shape)
        elif self.path.suffix == ".npy":
            features = np.load(self.path, mmap_mode="r")
            for start in range(0, len(features), _BLOCK):
                yield np.array(features[start : start + _BLOCK])
        else:
            with safe_open(self.path, "numpy") as file:
                rows = file.get_slice("features")
                for start in range(0, len(self.files), _BLOCK):
                    yield rows[start : min(start + _BLOCK, len(self.files))]

    def _open(self) -> tuple[dict[str, Any], list[str]]:
        if self.path.suffix == ".parquet":
            from pyarrow import parquet

            file = parquet.ParquetFile(self.path)
            return json.loads(file.schema_arrow.metadata[_KEY.encode()]), file.read(["file"])["file"].to_pylist()
        if self.path.suffix == ".npy":
            self.path.stat()
            text = json.loads(sidecar(self.path).read_text())
            return text[_KEY], text["files"]
        with safe_open(self.path, "numpy") as file:
            return json.loads(file.metadata()[_KEY]), json.loads(file.get_tensor("files").tobytes())
