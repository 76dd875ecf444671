"""Pulling demo models from a package index: here a directory of wheels that pip is pointed at."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from gguf_samples import write_gguf

from headrace.store import DownloadError, PullListener, installed, models_dir, open_model, pull, resolve
from headrace.store.builtin import BUILTIN_MODELS, BuiltinModel, PackagedFile


class Heard(PullListener):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)


def wheel(index: Path, name: str, member: str, content: bytes) -> None:
    """A wheel with one data file, and code that must never run."""
    with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/{member}", content)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('this was run')")
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index with a model in two parts, known as "tiny"."""
    directory = tmp_path / "index"
    directory.mkdir()
    content = write_gguf(tmp_path / "model.gguf").read_bytes()
    half = len(content) // 2
    wheel(directory, "tiny_one", "a.part", content[:half])
    wheel(directory, "tiny_two", "b.part", content[half:])
    pieces = (
        PackagedFile("tiny-one", "1.0", "tiny_one/a.part"),
        PackagedFile("tiny-two", "1.0", "tiny_two/b.part"),
    )
    sha256 = hashlib.sha256(content).hexdigest()
    tiny = BuiltinModel("tiny", "a test", "CC0", pieces, len(content), sha256)
    monkeypatch.setitem(BUILTIN_MODELS, "tiny", tiny)
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def nothing_is_left() -> bool:
    return installed() == [] and all(path.suffix == ".lock" for path in models_dir().iterdir())


def test_a_pulled_model_is_whole_and_stays(index: Path) -> None:
    heard = Heard()
    model = resolve("tiny", heard)
    assert heard.stages == ["download tiny-one 1.0", "check", "download tiny-two 1.0", "check", "convert"]
    assert model.name == "tiny" and model.directory == models_dir() / "tiny"
    original = (model.directory / "original.gguf").read_bytes()
    assert hashlib.sha256(original).hexdigest() == BUILTIN_MODELS["tiny"].sha256
    for path in index.iterdir():
        path.unlink()
    again = Heard()
    assert resolve("tiny", again).revision == model.revision and again.stages == []
    assert not list(model.directory.glob("download-*"))


def test_other_bytes_under_the_name_are_refused(index: Path) -> None:
    wheel(index, "tiny_two", "b.part", b"something else")
    with pytest.raises(DownloadError, match="SHA-256"):
        pull("tiny")
    assert nothing_is_left()


def test_one_changed_byte_is_noticed(index: Path, tmp_path: Path) -> None:
    content = (tmp_path / "model.gguf").read_bytes()
    half = len(content) // 2
    wheel(index, "tiny_two", "b.part", content[half:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DownloadError, match="SHA-256"):
        pull("tiny")
    assert nothing_is_left()


def test_a_member_larger_than_expected_is_not_read_to_its_end(index: Path) -> None:
    wheel(index, "tiny_one", "a.part", bytes(50_000_000))
    with pytest.raises(DownloadError, match="larger than expected"):
        pull("tiny")
    assert nothing_is_left()


def test_a_wheel_without_the_file_is_refused(index: Path) -> None:
    wheel(index, "tiny_one", "other.part", b"x")
    with pytest.raises(DownloadError, match=r"does not hold tiny_one/a.part"):
        pull("tiny")
    assert nothing_is_left()


def test_a_missing_package_is_said_with_what_to_do(index: Path) -> None:
    (index / "tiny_two-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DownloadError, match=r"(?s)could not download tiny-two==1.0: ERROR.*models import"):
        pull("tiny")
    assert nothing_is_left()


def test_demo_models_say_where_they_come_from(smollm2_dir: Path, gemma3_dir: Path) -> None:
    smollm2, gemma3 = open_model(smollm2_dir), open_model(gemma3_dir)
    assert (smollm2.model_type, smollm2.eos_token_ids, smollm2.bos_token_id) == ("llama", (2,), 1)
    assert (gemma3.model_type, gemma3.eos_token_ids, gemma3.bos_token_id) == ("gemma3_text", (1,), 2)
    assert smollm2.chat_template is not None and gemma3.chat_template is None
    for model in (smollm2, gemma3):
        assert BUILTIN_MODELS[model.name].licence
