"""How the jobs of a sweep are started; tests/experiment/test_job.py runs some."""

import pytest
from hydra import initialize_config_dir

from ipt.config import conf_dir
from ipt.experiment.launcher import _processes

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]


@pytest.mark.parametrize(
    ("command", "overrides", "expected"),
    [
        ("train", ["experiment=tiny"], []),
        ("train", ["experiment=tiny", "trainer.devices=4"], TORCHRUN),
        ("synthesize", ["trainer.devices=4"], []),
        ("train", ["trainer.devises=4"], []),  # told by the job
    ],
)
def test_a_job_of_several_processes_is_started_by_torchrun(command, overrides, expected):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert _processes(command, overrides) == expected
