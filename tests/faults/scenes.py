"""What is run under faults: a tiny run, fresh and resumed, and exports that replace an earlier one; and how one goes on after."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from faults.machine import Machine, Trial
from faults.promises import after_export, after_run, finished

SETTINGS = [
    "recipe=plain",
    *("data.sequence_length=16", "data.batch_size=4", "eval.max_tokens=64", "export.formats=[]", "optim.lr=1e-2"),
    *("trainer.max_steps=4", "trainer.checkpoint_every=2", "trainer.log_every_n_steps=1", "trainer.val_every=2"),
    *("trainer.val_batches=1", "trainer.progress=false", "trainer.accelerator=cpu", "trainer.threads=1"),
]


@dataclass(frozen=True)
class Run:
    """`qat train` into `root`, from nothing or from what `begun` holds."""

    name: str
    words: list[str]
    root: Path
    whole: Path
    begun: Path | None = None

    def disturbed(self, machine: Machine, at: int = 0, mode: str = "count", number: int = 0) -> Trial:
        """The run with harm at its `at`-th operation."""
        shutil.rmtree(self.root, ignore_errors=True)
        if self.begun is None:
            return machine.run([*self.words, f"run.dir={self.root}"], self.root, at, mode, number)
        shutil.copytree(self.begun, self.root)
        return machine.run(["train", f"resume={self.root}"], self.root, at, mode, number)

    def check(self, trial: Trial) -> None:
        """What lies in the folder is whole."""
        after_run(self.root, trial)

    def go_on(self, machine: Machine) -> None:
        """As a person would: resume what has begun, else start. The end is that of the undisturbed run."""
        begun = (self.root / "metrics.csv").exists() or (self.root / "checkpoints").exists()
        words = ["train", f"resume={self.root}"] if begun else [*self.words, f"run.dir={self.root}"]
        trial = machine.run(words, self.root)
        assert trial.code == 0, f"going on ends with {trial.code}: {trial.output[-1500:]}"
        finished(self.root, self.whole)


@dataclass(frozen=True)
class Export:
    """A writer, called with a packed folder, that replaces what another model left in `root`."""

    name: str
    writer: str
    packed: Path
    root: Path
    """The folder around the export."""
    target: str
    before: Path
    whole: Path

    def disturbed(self, machine: Machine, at: int = 0, mode: str = "count", number: int = 0) -> Trial:
        """The export with harm at its `at`-th operation."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.before, self.root)
        return self._write(machine, at, mode, number)

    def _write(self, machine: Machine, at: int, mode: str, number: int) -> Trial:
        words = [f"faults.scenes:{self.writer}", str(self.packed), str(self.root / self.target)]
        return machine.run(words, self.root, at, mode, number)

    def check(self, trial: Trial) -> None:
        """What lies there is the old export or the new one."""
        after_export(self.root / self.target, self.before / self.target, self.whole / self.target, trial)

    def go_on(self, machine: Machine) -> None:
        """The same command again."""
        trial = self._write(machine, 0, "count", 0)
        assert trial.code == 0, f"again ends with {trial.code}: {trial.output[-1500:]}"
        after_export(self.root / self.target, self.whole / self.target, self.whole / self.target, trial)
        assert [path.name for path in self.root.iterdir()] == [self.target]


Scene = Run | Export


def write_packed(packed: str, out: str) -> None:
    """What a run writes as packed/."""
    from qat.formats.packed import folder

    folder.save(folder.load(packed), out)


def write_hf(packed: str, out: str) -> None:
    """The stock folder, without its stock reader, which takes seconds."""
    from qat.formats.bitnet import writing
    from qat.formats.packed import folder

    writing.save(folder.load(packed), out)


def write_gguf(packed: str, out: str) -> None:
    """A GGUF file, every tensor read back."""
    from qat.formats.gguf import writing
    from qat.formats.packed import folder

    writing.save(folder.load(packed), out, floats="f32")


EXPORTS = {"packed": ("write_packed", "x"), "hf": ("write_hf", "x"), "gguf": ("write_gguf", "x.gguf")}


def announce(model: Path, text: Path, folder: Path) -> list[str]:
    """The words of the run; they are also what a new `Machine` in `folder` does first, to know what there is to import."""
    words = ["train", f"model.path={model}", f"data.train={text}", f"data.cache_dir={folder / 'cache'}", *SETTINGS]
    (folder / "first.json").write_text(json.dumps([*words, f"run.dir={folder / 'first'}"]))
    return words


def runs(machine: Machine, words: list[str], folder: Path) -> list[Run]:
    """The run from nothing, and from its first checkpoint."""
    whole = Run("fresh", words, folder / "whole", folder / "whole")
    trial = whole.disturbed(machine)
    assert trial.code == 0, trial.output
    fresh = Run("fresh", words, folder / "run", whole.root)
    writes = [n for n, line in enumerate(trial.operations, 1) if "/samples.md" in line]
    stopped = fresh.disturbed(machine, writes[-1], "kill")
    assert stopped.code == -9 and (fresh.root / "checkpoints/last.ckpt").exists(), stopped.output
    shutil.copytree(fresh.root, folder / "begun")
    return [fresh, Run("resumed", words, folder / "run", whole.root, folder / "begun")]


def exports(machine: Machine, words: list[str], folder: Path) -> list[Export]:
    """Each format over an export of another model."""
    packed, other, found = folder / "whole/packed", folder / "other/packed", []
    trial = machine.run([*words, f"run.dir={folder / 'other'}", "seed=1"], folder / "other")
    assert trial.code == 0, trial.output
    for name, (writer, target) in EXPORTS.items():
        before, whole = folder / f"{name}-before", folder / f"{name}-whole"
        for source, root in ((other, before), (packed, whole)):
            root.mkdir()
            trial = machine.run([f"faults.scenes:{writer}", str(source), str(root / target)], root)
            assert trial.code == 0, trial.output
        found.append(Export(name, writer, packed, folder / "export", target, before, whole))
    return found
