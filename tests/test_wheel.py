import os
import subprocess
import sys
import zipfile

from tests.commands import ROOT


def test_the_wheel_carries_conf_adapter_and_templates_and_runs_from_anywhere(tmp_path):
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for path in (ROOT / "conf").rglob("*.*"):
        assert f"ipt/{path.relative_to(ROOT)}" in names
    assert "ipt/conf/slurm/train.sbatch" in names
    assert "ipt/synthesis/adapter/adapter_model.safetensors" in names
    assert "ipt/rendering/templates/default.yaml" in names
    assert "hydra_plugins/ipt_sweeps/__init__.py" in names
    assert not [name for name in names if name.startswith("tests/")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    script = (
        "import ipt, sys; sys.argv = ['ipt', 'train', '--cfg', 'job']; print(ipt.__file__); from "
        "ipt.__main__ import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "site") in result.stdout.splitlines()[0]
    assert "embedded:smollm2-135m-synthesizer" in result.stdout
