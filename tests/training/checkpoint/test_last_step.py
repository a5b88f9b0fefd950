"""The last step is saved before the export, so an export that fails can be written again without
training.
"""

import pytest
import torch
from safetensors.torch import load_file

from ipt.errors import UserError
from ipt.export.huggingface import main
from ipt.training.checkpoint.storage import whole_checkpoints
from ipt.training.module import PretrainingModule
from tests.training.jobs import read_metrics, train


@pytest.fixture
def failed_export(stores, make_config, tmp_path):
    """A run that keeps no checkpoints, saves none on the way, and cannot write its export."""
    config = make_config(
        "checkpoint.every_n_train_steps=null", "checkpoint.keep_after_training=false"
    )
    output = tmp_path / "run"
    output.mkdir()
    (output / ".export.partial").write_text("a file where the export's folder is to be")
    with pytest.raises(UserError, match="run the same command again, which only writes the export"):
        train(config, stores, output)
    (output / ".export.partial").unlink()
    return config, output


def _assert_same_weights(left, right):
    ours, theirs = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_same_command_writes_a_failed_export_without_a_step(
    failed_export, uninterrupted, stores, tmp_path, monkeypatch
):
    config, output = failed_export
    (checkpoint,) = whole_checkpoints(output / "checkpoints")
    assert checkpoint.name == "step-00000006"
    main([str(output), str(tmp_path / "by_hand")])
    _assert_same_weights(tmp_path / "by_hand", uninterrupted[0] / "export")

    def step(*arguments):
        raise AssertionError("a step was trained")

    monkeypatch.setattr(PretrainingModule, "training_step", step)
    summary = train(config, stores, output)
    _assert_same_weights(output / "export", uninterrupted[0] / "export")
    assert summary["final_loss"] == uninterrupted[1]["final_loss"]
    assert len(read_metrics(output)) == 6
    assert not (output / "checkpoints").exists()
