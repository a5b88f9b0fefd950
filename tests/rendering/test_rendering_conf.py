from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ipt.rendering.run import check_rendering

CONF = Path(__file__).parents[2] / "conf"
RECIPES = sorted(path.stem for path in (CONF / "rendering").glob("*.yaml"))


def composed(name: str, *overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("schema", overrides=[f"+rendering={name}", *overrides])
    return OmegaConf.to_object(config.rendering)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_compose_and_pass_the_check(name: str):
    config = composed(name)
    check_rendering(config)
    assert config.arrangement == {"paper": "attached"}.get(name, name)
    assert config.layouts == {
        "classic": 80,
        "dialogue": 5,
        "numbered": 5,
        "inline_few_shot": 5,
        "next_turn": 5,
    }
    assert config.inversion == 0.05


def test_each_weight_is_a_key():
    assert composed("paper", "rendering.layouts.dialogue=50").layouts["dialogue"] == 50
