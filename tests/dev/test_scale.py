"""dev.scale on small inputs: results do not depend on the number of ranks, and fits are right."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint import CheckpointException

from dev.scale import ranks
from dev.scale.memory import HOST, Record
from dev.scale.packages import Cost, fit
from ipt.config import TrainerConfig
from ipt.training.checkpoint.storage import is_whole, read_facts, read_random
from ipt.training.memory_estimate import sharded
from ipt.training.parallelize import data_mesh

ROOT = Path(__file__).resolve().parents[2]


def test_64_ranks_read_what_one_process_reads_and_512_resume():
    data = ranks.synthetic_data(2 * 512, 16)
    whole = ranks.steps_of(data, 1, 512)
    assert [len(step) for step in whole] == [512, 512] and len(
        {sequence for step in whole for sequence in step}
    ) == 1024
    assert ranks.steps_of(data, 64, 8) == whole
    assert ranks.steps_of(data, 512, 1, taken=512) == whole[1:]


def test_a_plan_of_a_trillion_tokens_gives_any_rank_its_batch_at_once():
    data = ranks.synthetic_data(10**12 // 2048 // 512 * 512, 2048, 2_000_000_000)
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
def test_shards_of_512_ranks_have_the_sizes_of_the_dry_run(replicas):
    held = []
    for rank in (0, 63, 511):
        with ranks.one_of(rank, 512) as mesh:
            found = data_mesh(mesh, replicas)
            assert found.size() == 512 and found.ndim == (1 if replicas == 1 else 2)
            if replicas > 1:  # neighbours share a replica
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


@pytest.mark.parametrize(("replicas", "resumed", "resumed_replicas"), [(1, 4, 2), (2, 12, 1)])
def test_a_checkpoint_is_bit_identical_at_another_number_of_ranks(
    tmp_path, replicas, resumed, resumed_replicas
):
    folder, model = tmp_path / "step-00000001", ranks.tiny_model()
    ranks.write_together(model, folder, 8, replicas)
    assert is_whole(folder) and not list(tmp_path.glob(".*"))
    files = read_facts(folder)["files"]
    assert len([name for name in files if name.startswith("shard-")]) == 8
    assert [read_random(folder, rank) for rank in range(8)] == [{"rank": rank} for rank in range(8)]
    assert ranks.differences(model, folder, resumed, resumed_replicas) == []
    one, other = sorted(folder.glob("shard-*"))[:2]
    shutil.copy(one, other)  # the files of every rank are needed
    assert _is_broken(model, folder, resumed, resumed_replicas)


def _is_broken(model, folder, resumed, resumed_replicas):
    try:
        return bool(ranks.differences(model, folder, resumed, resumed_replicas))
    except CheckpointException:
        return True


def test_an_error_in_one_rank_ends_all_ranks():
    def work(rank: int) -> None:
        if rank == 2:
            raise OSError("disk full")
        ranks.dist.barrier()

    with pytest.raises(OSError, match="disk full"):
        ranks.together(4, work)
    assert not ranks.dist.is_initialized()


def test_fit_finds_slope_start_growth_and_memory():
    linear = fit([Cost(size, 2 + 0.5 * size, (100 + 3 * int(size)) << 20) for size in (1, 4, 16)])
    assert linear == pytest.approx((0.5, 2.0, 1.0, 3.0))
    assert fit([Cost(size, size * size, 0) for size in (1, 4, 16)]).growth == pytest.approx(4.0)
    assert Record("a table", "document", 500, 100.0).tokens_of_a_host == HOST / 100 * 500


def test_the_command_prints_the_table_of_memory():
    command = [sys.executable, "-m", "dev.scale", "memory", "--units", "200"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "corpus.near_duplicates" in result.stdout and "tasks of rendering" in result.stdout
