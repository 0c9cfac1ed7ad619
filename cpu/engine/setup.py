"""Puts `metok_cpu_engine.pth` beside the packages:
Python runs its line at the start of every process of the engine.

setuptools has no declarative way to install a `.pth` into site-packages, so the build step copies it.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class build_py_with_pth(build_py):
    def run(self) -> None:
        super().run()
        name = "metok_cpu_engine.pth"
        self.copy_file(str(Path(__file__).parent / name), str(Path(self.build_lib) / name))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / "metok_cpu_engine.pth")]


setup(cmdclass={"build_py": build_py_with_pth})
