"""Everything is in pyproject.toml; this refuses a checkout whose symbolic links came as text files."""

from pathlib import Path

from setuptools import setup

for link in ("modules", "datamodules", "callbacks", "configs", "train.py"):
    path = Path(__file__).parent / "src" / "rewurst" / link
    if not path.exists() or (path.is_file() and not link.endswith(".py")):
        raise SystemExit(
            f"{path} is not a working symbolic link: clone again with `git clone -c core.symlinks=true` "
            "(on Windows with developer mode on)"
        )

setup()
