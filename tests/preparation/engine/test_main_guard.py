"""A script without a main guard gets an explanation, whatever starts worker processes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

IMAGES = "from rewurst.preparation.images import prepare_images as run\nrun(['in'], 'out', workers=2, progress=False)\n"
INDEX = "from rewurst.preparation.index import index_shards as run\nrun(['in'], workers=2, progress=False)\n"


@pytest.mark.parametrize("script", [IMAGES, INDEX], ids=["images", "index"])
@pytest.mark.parametrize("guarded", [False, True])
def test_the_missing_guard_is_named(script: str, guarded: bool, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, "PNG")
        with tarfile.open(tmp_path / "in" / f"{number}.tar", "w") as tar:
            for name, content in ((f"{number}.png", file.getvalue()), (f"{number}.txt", b"a")):
                (tmp_path / "in" / name).write_bytes(content)
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    call = script.splitlines()[1]
    if guarded:
        script = script.replace(call, f"if __name__ == '__main__':\n    {call}")
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if guarded:
        assert done.returncode == 0, done.stderr
        return
    last = done.stderr.strip().splitlines()[-1]
    assert "the worker processes could not start: each of them imports " in last
    assert 'script.py again, so what that does must stand below `if __name__ == "__main__":`' in last
    assert "memory" not in last
