"""From what a user types to a model: paths, names, hub ids."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from gguf_samples import write_gguf

from headrace.store import DownloadError, ModelError, ModelNotFoundError, import_gguf, installed, resolve
from headrace.store.hub import ALLOWED


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "My model (1).gguf")
    first = resolve(source)
    assert first.name == "My model (1)" and first.directory.name.startswith("My-model-1-")
    stamp = (first.directory / "config.json").stat().st_mtime_ns
    assert resolve(str(source)).directory == first.directory
    assert (first.directory / "config.json").stat().st_mtime_ns == stamp
    write_gguf(source, seed=1)
    os.utime(source, ns=(1, 1))
    assert resolve(source).directory != first.directory


def test_an_import_under_a_name_is_found_by_it(tmp_path: Path) -> None:
    directory = import_gguf(write_gguf(tmp_path / "model.gguf"), "mine")
    assert resolve("mine").directory == directory and installed() == ["mine"]
    import_gguf(write_gguf(tmp_path / "other.gguf", "qwen2"), "mine")
    assert resolve("mine").model_type == "qwen2" and installed() == ["mine"]


def test_a_directory_is_taken_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = import_gguf(write_gguf(tmp_path / "model.gguf"), "mine")
    monkeypatch.chdir(directory.parent)
    assert resolve("./mine").directory == Path("mine")
    monkeypatch.setenv("HOME", str(directory.parent))
    assert resolve("~/mine").name == "mine"


def test_an_unknown_name_is_told_what_there_is(tmp_path: Path) -> None:
    import_gguf(write_gguf(tmp_path / "model.gguf"), "mine")
    with pytest.raises(ModelNotFoundError, match=r"no model 'yours'.*gemma3-270m, mine, smollm2-135m"):
        resolve("yours")
    with pytest.raises(ModelNotFoundError, match=r"no file .*none.gguf"):
        resolve(tmp_path / "none.gguf")
    with pytest.raises(ModelNotFoundError):
        resolve("")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04" + bytes(100))
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(tmp_path / "model.bin")
    assert installed() == []


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(DownloadError, match=r"organisation/model is not on this machine.*give its path"):
        resolve("organisation/model")
    with pytest.raises(DownloadError, match="not the id of a model"):
        resolve("organisation/--model")


def test_a_hub_snapshot_is_found_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the layout that the hub's own library keeps."""
    cache = tmp_path / "hub" / "models--organisation--model"
    (cache / "refs").mkdir(parents=True)
    commit = "0" * 40
    (cache / "refs" / "main").write_text(commit)
    source = import_gguf(write_gguf(tmp_path / "model.gguf"), "mine")
    (cache / "snapshots").mkdir()
    source.rename(cache / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = resolve("organisation/model")
    assert model.name == "organisation/model" and model.directory == cache / "snapshots" / commit


def test_nothing_that_could_run_is_fetched() -> None:
    suffixes = {pattern.rpartition(".")[2] for pattern in ALLOWED if pattern.startswith("*")}
    assert suffixes == {"json", "safetensors", "jinja"}


def test_the_room_needs_no_torch() -> None:
    script = (
        "import sys, headrace.store, headrace.text, headrace.cli.models\n"
        "print(*(m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "\n"
