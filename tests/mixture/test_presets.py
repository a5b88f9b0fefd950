from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ipt.cli import conf_dir
from ipt.mixture.schedule import read_schedule

PRESETS = sorted(
    path.stem for path in (Path(__file__).parents[2] / "conf" / "mixture").glob("*.yaml")
)
SHARES = {
    "instruct": {"raw": 0.5, "instruction": 0.5},
    "vanilla": {"raw": 1.0},
    "two_stage": {"raw": 0.5, "instruction": 0.5},
    "paper_domain": {"instruction": 0.5, "general": 0.5},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_gives_its_shares(preset):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = OmegaConf.to_object(compose("train", [f"mixture={preset}"]))
    schedule = read_schedule(config.mixture)
    assert dict(zip(schedule.sources, schedule.mean().tolist(), strict=True)) == pytest.approx(
        SHARES[preset]
    )
    for point in schedule.sources:
        assert point in ("raw", "instruction") or point in config.mixture.sources


def test_two_stage_begins_with_less_instruction_text():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = OmegaConf.to_object(
            compose("train", ["mixture=two_stage", "mixture.schedule.1.at=0.8"])
        )
    assert read_schedule(config.mixture).mean().tolist() == pytest.approx(
        [0.8 * 0.7 + 0.2 * 0.3, 0.8 * 0.3 + 0.2 * 0.7]
    )
