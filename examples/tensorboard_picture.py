"""A picture of a TensorBoard tab, taken by a headless Chromium: what somebody who opens the page sees.

python examples/tensorboard_picture.py runs/demo docs/tensorboard.png
python examples/tensorboard_picture.py runs/demo docs/tensorboard_text.png --tab text

Needs Chromium: `apt-get install chromium`, or name another browser of its family with --browser. Everything stays on
the loopback interface.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tensorboard import program

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TABS = ("custom_scalars", "timeseries", "scalars", "images", "text", "hparams")


def serve(folder: Path) -> str:
    """Start TensorBoard over a folder in this process, and return its address."""
    server = program.TensorBoard()
    server.configure(argv=["tensorboard", "--logdir", str(folder), "--port", "0", "--load_fast", "false"])
    return server.launch()


def photograph(browser: str, url: str, size: tuple[int, int], seconds: int) -> Image.Image:
    """Open a page, let it load for some seconds of its own time, and take its picture."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "page.png"
        command = [browser, "--headless=new", "--hide-scrollbars", "--disable-gpu", "--no-first-run", "--mute-audio"]
        command += ["--no-sandbox", f"--user-data-dir={folder}/profile"]  # a container's root has no sandbox
        command += [f"--window-size={size[0]},{size[1]}", f"--virtual-time-budget={1000 * seconds}"]
        done = subprocess.run([*command, f"--screenshot={out}", url], capture_output=True, text=True, check=False)
        if not out.is_file():
            sys.exit(f"{browser} took no picture of {url}: {done.stderr.strip().splitlines()[-1:]}")
        with Image.open(out) as picture:
            return picture.convert("RGB")


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="LOGDIR", help="folder of runs")
    parser.add_argument("out", type=Path, metavar="OUT", help="PNG to write")
    parser.add_argument("--tab", choices=TABS, default="custom_scalars")
    parser.add_argument("--size", type=int, nargs=2, default=(1500, 2000), metavar=("WIDTH", "HEIGHT"), help="pixels")
    parser.add_argument("--seconds", type=int, default=30, help="that the page has to load")
    parser.add_argument("--browser", default=next((name for name in BROWSERS if shutil.which(name)), None))
    parsed = parser.parse_args(args)
    if parsed.browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed: name a browser with --browser")
    picture = photograph(parsed.browser, f"{serve(parsed.folder)}#{parsed.tab}", tuple(parsed.size), parsed.seconds)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(256).save(parsed.out, optimize=True)
    print(parsed.out)


if __name__ == "__main__":
    main()
