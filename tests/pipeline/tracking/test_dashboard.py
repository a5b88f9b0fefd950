import json
import sys

import pytest

from ipt.pipeline.tracking import dashboard


@pytest.fixture
def views(monkeypatch, tmp_path):
    """Name of the section -> its panels, as they are written without a key."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = dashboard.dashboard("trials", "team", ["medqa/correct"], tmp_path / "workspace.json")
    assert "wandb login" in said
    written = json.loads((tmp_path / "workspace.json").read_text())
    assert (written["project"], written["entity"]) == ("trials", "team")
    return {
        section["name"]: section["panels"]
        for section in written["spec"]["section"]["panelBankConfig"]["sections"]
    }


def test_the_views_that_matter_are_there(views):
    ratio = [panel["config"] for panel in views["Which ratio?"]]
    assert [panel["yAxis"] for panel in ratio] == ["summary:loss", "summary:medqa/correct"]
    assert all(
        panel["xAxis"].startswith("config:mixture")
        and panel["xAxis"].endswith("ratios.instruction")
        for panel in ratio
    )
    curves = {
        panel["config"]["chartTitle"]: panel["config"]
        for name in ("Loss", "Throughput", "Stability")
        for panel in views[name]
    }
    assert all(curve["xAxis"] == "tokens" for curve in curves.values())
    assert curves["skipped steps"]["metrics"] == ["skipped"]
    assert curves["tokens/s per device"]["metrics"] == ["tokens_per_second"]
    assert curves["loss by source"]["metricRegex"] == "loss/.*"
    assert "synthesis/grounded_rate" in json.dumps(views["Synthesis"])
    for name, section in (
        ("pairs", "Synthesis"),
        ("results", "Evaluation"),
        ("predictions", "Evaluation"),
    ):
        assert f'"val": "{name}"' in json.dumps(views[section])


@pytest.mark.parametrize(
    ("words", "told"), [([], "which project?"), (["projekt=x"], "projekt=x is none of project=…")]
)
def test_mistakes_are_one_line(words, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipt dashboard", *words])
    with pytest.raises(SystemExit):
        dashboard.main()
    assert capsys.readouterr().err.startswith("error: " + told)


def test_without_the_extra_it_says_which(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ValueError, match=r"ipt\[dashboard\]"):
        dashboard.workspace("trials", "team")
