"""`headrace models`, as a user types it."""

from pathlib import Path

import pytest
from gguf_samples import write_gguf
from typer.testing import CliRunner

from headrace.cli.models import app
from headrace.store import installed


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path / "home"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_list_shows_what_can_be_pulled_with_its_licence() -> None:
    status, out, _ = run("list")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "not pulled" in lines["smollm2-135m"] and "Apache-2.0" in lines["smollm2-135m"]
    assert "Gemma Terms of Use" in lines["gemma3-270m"] and "253 MB to fetch" in lines["gemma3-270m"]


def test_import_show_list_and_remove(tmp_path: Path, home: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", metadata={"general.license": "mit"})
    status, out, _ = run("import", str(source), "--name", "mine")
    assert status == 0 and out.strip() == str(home / "models" / "mine")
    status, out, _ = run("list")
    mine = next(line for line in out.splitlines() if line.startswith("mine"))
    assert "installed" in mine and "mit" in mine and f"from{source}" in "".join(out.split())
    status, out, _ = run("show", "mine")
    facts = {line[:14].strip(): line[14:].strip() for line in out.splitlines()}
    assert status == 0 and facts["architecture"] == "llama" and facts["heads"] == "4 query, 2 key and value"
    assert facts["stored as"] == "F32" and facts["licence"] == "mit" and facts["context"] == "1024 tokens"
    assert run("rm", "mine") == (0, "removed mine\n", "")
    assert installed() == []


def test_a_damaged_model_is_listed_as_such(tmp_path: Path, home: Path) -> None:
    run("import", str(write_gguf(tmp_path / "model.gguf")), "--name", "mine")
    (home / "models" / "mine" / "config.json").unlink()
    assert "damaged" in run("list")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "none"], "error: no model 'none'"),
        (["pull", "none"], "error: no model 'none'"),
        (["rm", "none"], "error: no model 'none'"),
        (["import", "/none.gguf"], "error: no file /none.gguf"),
        (
            ["import", "/none.gguf", "--name", "smollm2-135m"],
            "error: smollm2-135m is the name of a built-in model",
        ),
        (["import", "/none.gguf", "--name", "../up"], "error: "),
    ],
)
def test_errors_are_one_line_on_stderr(arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert status == 1 and out == "" and err.startswith(message) and "Traceback" not in err
