"""dev/scale on little: hundreds of ranks read and write what few do, and slopes are what
they say.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint import CheckpointException

from dev.scale import ranks
from dev.scale.held import HOST, Held
from dev.scale.rooms import Cost, fit
from ipt.config import TrainerConfig
from ipt.training.checkpoint.storage import is_whole, read_facts, read_random
from ipt.training.memory_estimate import sharded
from ipt.training.parallelize import data_mesh

ROOT = Path(__file__).resolve().parents[2]


def test_64_ranks_read_what_one_process_reads_and_512_go_on():
    data = ranks.made_up_data(2 * 512, 16)
    whole = ranks.steps_of(data, 1, 512)
    assert [len(step) for step in whole] == [512, 512] and len(
        {sequence for step in whole for sequence in step}
    ) == 1024
    assert ranks.steps_of(data, 64, 8) == whole
    assert ranks.steps_of(data, 512, 1, taken=512) == whole[1:]


def test_a_plan_of_a_trillion_tokens_gives_any_rank_its_batch_at_once():
    data = ranks.made_up_data(10**12 // 2048 // 512 * 512, 2048, 2_000_000_000)
    first, last = (ranks.MicroBatches(data, 1, 1, rank, 512) for rank in (0, 511))
    step = len(first) - 1
    (one, *_, targets), (other, *_, same) = first[step], last[step]
    assert one.shape == other.shape == (4, 1, 2048) and not one.equal(other)
    assert (
        targets
        == same
        == sum(data.target_count(index) for index in range(512 * step, 512 * step + 512))
    )


@pytest.mark.parametrize("replicas", [1, 8, 64])
def test_slices_of_512_ranks_are_those_that_the_dry_run_foresees(replicas):
    held = []
    for rank in (0, 63, 511):
        with ranks.one_of(rank, 512) as mesh:
            found = data_mesh(mesh, replicas)
            assert found.size() == 512 and found.ndim == (1 if replicas == 1 else 2)
            if replicas > 1:  # neighbours share a copy
                assert list(found.get_coordinate()) == [
                    rank // (512 // replicas),
                    rank % (512 // replicas),
                ]
            model = ranks.tiny_model()
            ranks.shard(
                model, ranks.transformer_blocks(model), found, TrainerConfig(accelerator="cpu")
            )
            held.append([ranks.local(parameter).numel() for parameter in model.parameters()])
    assert held[0] == [
        sharded(parameter, 512 // replicas) for parameter in ranks.tiny_model().parameters()
    ]
    assert all(mine <= most for rank in held[1:] for mine, most in zip(rank, held[0], strict=True))


@pytest.mark.parametrize(("replicas", "resumed", "copies"), [(1, 4, 2), (2, 12, 1)])
def test_a_checkpoint_of_many_ranks_is_read_by_others_to_the_bit(
    tmp_path, replicas, resumed, copies
):
    folder, model = tmp_path / "step-00000001", ranks.tiny_model()
    ranks.write_together(model, folder, 8, replicas)
    assert is_whole(folder) and not list(tmp_path.glob(".*"))
    files = read_facts(folder)["files"]
    assert len([name for name in files if name.startswith("shard-")]) == 8
    assert [read_random(folder, rank) for rank in range(8)] == [{"rank": rank} for rank in range(8)]
    assert ranks.differences(model, folder, resumed, copies) == []
    one, other = sorted(folder.glob("shard-*"))[:2]
    shutil.copy(one, other)  # each rank's file is needed
    assert _is_broken(model, folder, resumed, copies)


def _is_broken(model, folder, resumed, copies):
    try:
        return bool(ranks.differences(model, folder, resumed, copies))
    except CheckpointException:
        return True


def test_what_goes_wrong_in_one_rank_ends_all_of_them():
    def work(rank: int) -> None:
        if rank == 2:
            raise OSError("disk full")
        ranks.dist.barrier()

    with pytest.raises(OSError, match="disk full"):
        ranks.together(4, work)
    assert not ranks.dist.is_initialized()


def test_slopes_starts_and_growth():
    linear = fit([Cost(size, 2 + 0.5 * size, (100 + 3 * int(size)) << 20) for size in (1, 4, 16)])
    assert linear == pytest.approx((0.5, 2.0, 1.0, 3.0))
    assert fit([Cost(size, size * size, 0) for size in (1, 4, 16)]).growth == pytest.approx(4.0)
    assert Held("a table", "document", 500, 100.0).tokens_of_a_host == HOST / 100 * 500


def test_the_command_says_what_is_held():
    command = [sys.executable, "-m", "dev.scale", "held", "--units", "200"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "corpus.near_duplicates" in result.stdout and "tasks of rendering" in result.stdout
