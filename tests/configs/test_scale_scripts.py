"""The scripts for clusters, with stubs for the commands of SLURM and torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "configs" / "scale"
RUN = """#!/bin/bash
echo "srun $*" >> "$SAID"
trap 'echo saved >> "$SAID"; exit 0' USR1
echo $$ > "$STARTED"
read -r status < "$ENDS"
exit "$status"
"""
STAND_INS = {
    "srun": RUN,
    "scancel": '#!/bin/bash\necho "scancel $*" >> "$SAID"\nkill -USR1 "$(cat "$STARTED.pid")"\n',
    "scontrol": '#!/bin/bash\necho "scontrol $*" >> "$SAID"\n',
    "torchrun": '#!/bin/bash\necho "torchrun $*" >> "$SAID"\n',
    "rewurst": "#!/bin/bash\n",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Put stubs on the path that write their arguments to the file ``SAID``."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for pipe in ("started", "ends"):
        os.mkfifo(tmp_path / pipe)
    own = {name.upper(): str(tmp_path / name) for name in ("said", "started", "ends")}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    return {**os.environ, **own, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize(("status", "out_of_time"), [(0, False), (1, False), (0, True)])
def test_slurm(environment: dict[str, str], tmp_path: Path, status: int, out_of_time: bool) -> None:
    """A run out of time saves and is then queued again; a finished or failed one is not."""
    script = subprocess.Popen(["bash", str(SCRIPTS / "slurm.sbatch"), "--config=a.yaml"], env=environment)
    started = (tmp_path / "started").read_text()  # waits until the step runs
    (tmp_path / "started.pid").write_text(started)
    if out_of_time:
        script.send_signal(signal.SIGUSR1)
    else:
        (tmp_path / "ends").write_text(f"{status}\n")
    assert script.wait(timeout=30) == status
    first, *then = (tmp_path / "said").read_text().splitlines()
    wanted = "rewurst fit --config=a.yaml --trainer.num_nodes=2 --trainer.devices=8"
    assert first == f"srun --kill-on-bad-exit=1 {wanted}"
    assert then == (["scancel --signal=USR1 7.0", "saved", "scontrol requeue 7"] if out_of_time else [])


def test_torchrun(environment: dict[str, str], tmp_path: Path) -> None:
    environment |= {"NODES": "8", "HEAD": "node-0"}
    subprocess.run(["sh", str(SCRIPTS / "torchrun.sh"), "--config=a.yaml"], env=environment, check=True)
    said = (tmp_path / "said").read_text().split()
    assert {"--nnodes=8", "--nproc-per-node=8", "--rdzv-endpoint=node-0:29500"} <= set(said)
    wanted = f"{tmp_path}/rewurst fit --config=a.yaml --trainer.num_nodes=8 --trainer.devices=8"
    assert " ".join(said).endswith(wanted)
