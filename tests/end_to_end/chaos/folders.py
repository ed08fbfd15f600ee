"""Dozens of adapters in a folder of their own, and what can befall them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import load_file, save_file

from loraplex.server.demo.assets import adapters_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = ("upper", "reverse", "spell", "devowel", "echo", "caesar")
"""Tasks on words whose adapters are small."""

SLOW_PART = "slow"
SLOW_FILE = "CHAOS_SLOW_FILE"
SLOW_SITE = f'''\
"""Reads of files below folders with "{SLOW_PART}" in their name take as many seconds as a file says."""

import os
import time

_open = os.open


def _slow_open(path, *arguments, **options):
    if "{SLOW_PART}" in os.path.basename(os.path.dirname(os.fspath(path))):
        try:
            with open(os.environ["{SLOW_FILE}"]) as file:
                seconds = float(file.read() or 0)
        except (KeyError, OSError):
            seconds = 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and os.path.exists(os.environ["{SLOW_FILE}"]):
            time.sleep(0.05)
    return _open(path, *arguments, **options)


os.open = _slow_open
'''


def copy_adapter(task: str, target: Path, number: int) -> Path:
    """An adapter of the demo with one weight changed a little, so that its content is one of its own."""
    shutil.copytree(adapters_folder() / task, target)
    tensors = load_file(target / WEIGHTS)
    first = tensors[min(tensors)]
    first.flat[0] += 1e-4 * (number + 1)
    save_file(tensors, target / WEIGHTS)
    return target


class AdapterFolders:
    """Adapters ``TASK-NUMBER`` below one folder.

    Args:
        root: made here.
        copies: of each task.
    """

    def __init__(self, root: Path, copies: int) -> None:
        self.root = root
        self._aside = root.with_name(f"{root.name}-aside")
        self._aside.mkdir()
        root.mkdir()
        for number in range(copies):
            for task in TASKS:
                copy_adapter(task, root / f"{task}-{number:02}", number)

    @property
    def names(self) -> Sequence[str]:
        """All of them, by name."""
        return sorted(path.name for path in self.root.iterdir())

    def path(self, name: str) -> Path:
        return self.root / name

    def weights(self, name: str) -> Path:
        return self.root / name / WEIGHTS

    def config(self, name: str) -> Path:
        return self.root / name / CONFIG

    def keep(self, *names: str) -> None:
        """Set what is whole aside, for ``mend``."""
        for name in names:
            if not (self._aside / name).exists():
                shutil.copytree(self.root / name, self._aside / name)

    def mend(self, *names: str) -> None:
        """As they were when they were kept, the configuration last: a folder counts from then on."""
        for name in names:
            folder = self.root / name
            shutil.rmtree(folder, ignore_errors=True)
            fresh = folder.with_name(f".{name}")
            shutil.copytree(self._aside / name, fresh)
            fresh.rename(folder)

    def mend_all(self) -> None:
        """Whatever was ever kept is as it was then."""
        self.mend(*(path.name for path in self._aside.iterdir()))

    def delete(self, name: str) -> None:
        self.keep(name)
        shutil.rmtree(self.root / name)

    def truncate(self, name: str) -> None:
        """Half of the tensors' file is gone; whoever is reading it sees that, too."""
        self.keep(name)
        os.truncate(self.weights(name), self.weights(name).stat().st_size // 2)

    def swap(self, one: str, other: str) -> None:
        """Each folder holds the other one's files from now on, all of them whole."""
        self.keep(one, other)
        between = self.root / ".between"
        (self.root / one).rename(between)
        (self.root / other).rename(self.root / one)
        between.rename(self.root / other)

    def spoil_config(self, name: str) -> None:
        self.keep(name)
        self.config(name).write_text('{"peft_type": "LORA", "r": ')

    def close_off(self, name: str) -> None:
        """Nobody may read it."""
        self.keep(name)
        self.weights(name).chmod(0)

    def become_pipe(self, name: str) -> None:
        """A named pipe, into which nobody ever writes, lies in the place of the tensors' file."""
        self.keep(name)
        self.weights(name).unlink()
        os.mkfifo(self.weights(name))

    def become_broken_link(self, name: str) -> None:
        self.keep(name)
        self.weights(name).unlink()
        self.weights(name).symlink_to("nowhere")
