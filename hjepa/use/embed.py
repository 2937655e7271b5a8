"""A folder of images, or a source of the config, through the encoder of a run and into a file."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from hjepa.console import Console
from hjepa.data.bad_files import listed
from hjepa.data.source import Int64, links_left_out
from hjepa.device import choose
from hjepa.errors import ConfigError, DataError, FolderInUseError, StorageError
from hjepa.runfolder import BAD_IMAGES
from hjepa.use.features import FeatureFile, Float32, Header, Rows, check_suffix, sidecar, write
from hjepa.use.frozen import Encoder, Features, encoder_of
from hjepa.use.listing import Listing, list_folder, list_sources, pieces
from hjepa.weights import find_weights

# What a kill can cost, and what is held in memory.
_PART_IMAGES = 256
_PART_BYTES = 32 << 20
_PLAN = "plan.json"


@dataclass(frozen=True)
class Request:
    """What is wanted of each image.

    Attributes:
        level: the level whose features they are, None for the final tokens.
        tokens: all of them, in place of their mean.
        online: the context encoder in place of its slow average.
    """

    level: int | None = None
    tokens: bool = False
    online: bool = False

    @property
    def kind(self) -> str:
        """As in `Header`."""
        return "pooled" if self.level is None else f"level{self.level}"

    def of(self, encoder: Encoder, images: Tensor) -> Tensor:
        """`[B, 3, S, S]` normalised -> `[B, D]` or, with all tokens, `[B, N, D]`."""
        features: Features = encoder(images)
        rows = features.rows(self.level)
        return rows if self.tokens else rows.mean(dim=1)

    def check(self, encoder: Encoder) -> None:
        """Refuse a level that the run does not have.

        Raises:
            ConfigError: naming those it has.
        """
        if self.level is not None and not 0 <= self.level < encoder.num_levels:
            raise ConfigError(f"--level {self.level}: the run has the levels 0 to {encoder.num_levels - 1}")


def embed(
    run: Path,
    folder: Path | None,
    output: Path,
    request: Request,
    words: Sequence[str] = (),
    batch_size: int = 64,
    device: str = "auto",
) -> int:
    """Embed all images into a file; what an earlier call with the same arguments did is not done again.

    Args:
        run: folder of a run or of a checkpoint.
        folder: of images, nested or not; None for the sources that `words` or the run's config name.
        output: `.parquet`, `.npy` or `.safetensors`.
        request: what is wanted of each image.
        words: overrides of the run's choice of data (`listing.CHOICE`), such as
            `data.datasets=[{name: cifar10, split: test}]`.
        batch_size: images per forward pass.
        device: see `hjepa.device.choose`.

    Returns:
        how many images are in the file; those that cannot be read are named and are not.

    Raises:
        ConfigError, DataError, StorageError, FolderInUseError: in one line, for everything that the user can mend.
    """
    started = time.monotonic()
    check_suffix(output)
    kind, console = choose(device), Console()
    saved = find_weights(run, console.warn)
    encoder = encoder_of(saved, request.online)
    request.check(encoder)
    listing = list_folder(folder, encoder.data) if folder is not None else list_sources(saved, words)
    for source in listing.sources:
        if source.left_out:
            console.warn(links_left_out(source))
    shape = list(request.of(encoder, encoder.preprocess(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))).shape[1:])
    header = Header(
        **asdict(encoder.origin), kind=request.kind, shape=shape, images=listing.words, listing=listing.digest
    )
    if output.exists():
        there = _existing(output)
        _refuse_other(output, there.header, header, "remove the file, or choose another")
        console.say(f"Nothing left to do: {output} is complete")
        return len(there.files)
    parts = output.with_name(f".{output.name}.parts")
    with _storing(output), _held(parts, header):
        bad = _fill(parts, listing, encoder.to(kind.name), request, header, batch_size, console)
        count = _assemble(parts, output, header, listing, bad)
    shutil.rmtree(parts, ignore_errors=True)
    if bad:
        console.warn(
            f"{len(bad)} of {len(listing.names)} image file(s) cannot be read and are left out: {listed(bad)}; "
            f"all are listed in {_bad_list(output)}"
        )
    shown = " x ".join(map(str, shape))
    console.say(f"{output}: {count} images, {shown} float32 each, in {time.monotonic() - started:.1f} s")
    return count


def _refuse_other(path: Path, there: Header, wanted: Header, advice: str) -> None:
    differing = there.differences(wanted)
    if differing:
        raise ConfigError(f"{path}: made with other arguments ({differing}); repeat those, or {advice}")


def _existing(output: Path) -> FeatureFile:
    try:
        return FeatureFile(output)
    except DataError:
        raise ConfigError(
            f"{output}: is there already and was not made by hjepa embed; remove it, or choose another"
        ) from None


@contextmanager
def _held(parts: Path, header: Header) -> Iterator[None]:
    """The folder of parts, made or found again, and held by this process alone."""
    parts.mkdir(parents=True, exist_ok=True)
    with (parts / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FolderInUseError(f"{parts}: another process embeds into this file; choose another") from None
        plan = parts / _PLAN
        try:
            there = Header(**json.loads(plan.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            temporary = parts / f"{_PLAN}.tmp"
            temporary.write_text(json.dumps(asdict(header)))
            temporary.replace(plan)
        else:
            _refuse_other(parts, there, header, "remove that folder")
        yield


def _fill(
    parts: Path,
    listing: Listing,
    encoder: Encoder,
    request: Request,
    header: Header,
    batch_size: int,
    console: Console,
) -> dict[str, str]:
    """Embed part after part; what could not be read, reason by path."""
    total = len(listing.names)
    size = max(1, min(_PART_IMAGES, _PART_BYTES // (4 * int(np.prod(header.shape)))))
    starts = range(0, total, size)
    found = sum(_part(parts, start).exists() for start in starts)
    if found:
        console.say(f"Resuming: {found} of {len(starts)} parts are there")
    bad: dict[str, str] = {}
    bar = console.bar("Embedding", total)
    with console:
        for start in starts:
            stop = min(start + size, total)
            path = _part(parts, start)
            if not path.exists():
                rows, features, unread = _embed_range(listing, encoder, request, start, stop, batch_size)
                temporary = path.with_suffix(".tmp")
                # Names of files, not numbers: they are all that the list of unreadable ones holds.
                save_file({"rows": rows, "features": features}, temporary, {"bad": json.dumps(unread)})
                temporary.replace(path)
            with safe_open(path, "numpy") as file:
                bad |= json.loads(file.metadata()["bad"])
            bar.update(stop)
    if len(bad) >= total:
        raise DataError(f"{listing.words}: none of {total} files can be read: {listed(bad)}")
    return bad


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:012d}.safetensors"


@torch.no_grad()
def _embed_range(
    listing: Listing, encoder: Encoder, request: Request, start: int, stop: int, batch_size: int
) -> tuple[Int64, Float32, dict[str, str]]:
    """Numbers of the images [start, stop) that can be read, their features, and the others, reason by path."""
    numbers: list[Int64] = []
    features: list[Float32] = []
    bad: dict[str, str] = {}
    for piece in pieces(listing, start, stop, batch_size):
        bad |= piece.read.bad
        squares = encoder.preprocess.squares(torch.from_numpy(piece.read.images), piece.read.true_sizes)
        numbers.append(piece.numbers[piece.readable])
        features.append(request.of(encoder, squares).float().cpu().numpy()[piece.readable])
    return np.concatenate(numbers), np.concatenate(features), bad


def _assemble(parts: Path, output: Path, header: Header, listing: Listing, bad: dict[str, str]) -> int:
    """One file of all parts, in place whole or not at all; how many rows it has."""
    paths = sorted(parts.glob("*.safetensors"))
    count = 0
    for path in paths:
        with safe_open(path, "numpy") as file:
            count += file.get_slice("rows").get_shape()[0]
    finished = parts / "finished"
    write(finished, output.suffix, header, count, (_rows(path, listing) for path in paths))
    if bad:
        lines = (json.dumps({"file": path, "reason": reason}) for path, reason in bad.items())
        _bad_list(output).write_text("".join(f"{line}\n" for line in lines))
    else:
        _bad_list(output).unlink(missing_ok=True)
    if output.suffix == ".npy":
        sidecar(finished).replace(sidecar(output))
    finished.replace(output)
    return count


def _rows(path: Path, listing: Listing) -> Rows:
    with safe_open(path, "numpy") as file:
        numbers = file.get_tensor("rows")
        labels = None if listing.labels is None else listing.labels[numbers]
        return Rows([listing.names[i] for i in numbers], file.get_tensor("features"), labels)


def _bad_list(output: Path) -> Path:
    return output.with_name(f"{output.name}.{BAD_IMAGES}")


@contextmanager
def _storing(output: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{output}: could not be written ({reason}); repeat the command to go on") from error
