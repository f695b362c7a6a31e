"""What pyproject.toml cannot say: a wheel has copies of configs/ and docs/ inside the package."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
COPIED = ("configs/*.toml", "docs/*.md")


class BuildWithConfigs(build_py):
    """Copies the files of `COPIED`, too, unless the installation is editable."""

    def run(self) -> None:
        """Build as setuptools does, then copy."""
        super().run()
        for pattern in () if self.editable_mode else COPIED:
            for path in ROOT.glob(pattern):
                target = pathlib.Path(self.build_lib, "anima_jax", path.relative_to(ROOT))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


setup(cmdclass={"build_py": BuildWithConfigs})
