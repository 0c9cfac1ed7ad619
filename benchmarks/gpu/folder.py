"""Where a report's figures, logs and notes lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """One report's folder; a second call on it goes on with what is left."""

    path: Path

    @property
    def results(self) -> Path:
        """JSON, CSV and plots: what is worth keeping."""
        return self.path / "results"

    @property
    def logs(self) -> Path:
        """What each stage printed."""
        return self.path / "logs"

    @property
    def state(self) -> Path:
        """How each stage ended, a JSON file each."""
        return self.path / "state"

    @property
    def work(self) -> Path:
        """Model folders and the engines' own logs."""
        return self.path / "work"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def machine(self) -> Path:
        return self.results / "machine.json"

    @property
    def kernels(self) -> tuple[Path, Path]:
        """The kernel benchmark's rows, without and with torch.compile's."""
        return self.results / "kernels-gpu.csv", self.results / "kernels-gpu-compile.csv"

    @property
    def engine_option(self) -> Path:
        """Arguments of `vllm.LLM` for every further engine, where something of the default is broken."""
        return self.path / "engine-option.json"

    @property
    def tiny(self) -> Path:
        """The engine benchmark's result on the tiny model."""
        return self.results / "engine-tiny-check.json"

    def engine(self, model: str, mode: str = "") -> Path:
        """The engine benchmark's result for a model's name or folder; `mode` is "" (default) or "eager"."""
        return self.results / f"engine-{Path(model).name}{mode and '-' + mode}.json"

    def make(self) -> None:
        for part in (self.results, self.logs, self.state, self.work):
            part.mkdir(parents=True, exist_ok=True)
