"""This project's side of benchmarks/training.py: the training stage itself, as train.py runs it."""

import json
import sys
from pathlib import Path

from stepping import Stepping

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ipt.config import compose_config  # noqa: E402
from ipt.training.checkpoint.storage import METRICS  # noqa: E402
from ipt.training.train import train  # noqa: E402


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    output = Path(job["output"])

    def losses() -> list[float]:
        path = output / METRICS
        return (
            [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()]
            if path.exists()
            else []
        )

    Stepping(losses)
    train(compose_config("train", job["overrides"]), {"raw": job["store"]}, output)


if __name__ == "__main__":
    main()
