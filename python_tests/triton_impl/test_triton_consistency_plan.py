"""Tiles and steps of the Triton losses, as they are planned; nothing is launched."""

import pytest

pytest.importorskip("triton")

from adamix_kernels.ops.consistency.triton_impl import plan


@pytest.mark.parametrize("classes", [1, 2, 3, 64, 1000, 4096])
@pytest.mark.parametrize("rows", [1, 3, 200, 8192])
def test_tiles_cover_every_row_and_class_once(rows, classes):
    tiles = plan.make_tiles(rows, classes)
    assert (tiles.tiles - 1) * tiles.rows < rows <= tiles.tiles * tiles.rows
    assert classes <= tiles.cols < 2 * max(classes, 2)
    assert tiles.rows * tiles.cols <= 4096
    assert tiles.programs == 1 or rows * tiles.cols > plan.TILE


@pytest.mark.parametrize(("rows", "classes"), [(8192, 2), (4096, 3), (1024, 9), (256, 64)])
def test_few_classes_are_one_launch(rows, classes):
    assert plan.make_tiles(rows, classes).programs == 1


@pytest.mark.parametrize(
    ("classes", "itemsize", "resident"), [(50257, 2, 2), (30522, 2, 2), (50257, 4, 1), (128256, 2, 1)]
)
def test_sixteen_warps_a_multiprocessor(classes, itemsize, resident):
    wide = plan.make_wide(classes, itemsize)
    assert (wide.resident, wide.resident * wide.num_warps) == (resident, 16)
    assert wide.vector * itemsize == 16
    assert wide.cols == wide.vector * 32 * wide.num_warps


@pytest.mark.parametrize("keep", [plan.HELD, plan.HELD_FULL])
def test_held_steps_are_in_every_row_and_leave_pairs(keep):
    for classes in (*range(plan.FEW + 1, 9 * 4096, 61), 50257, 128256):
        wide = plan.make_wide(classes, 2, keep=keep)
        steps = (classes - (wide.vector - 1)) // wide.cols
        assert 1 <= wide.held <= min(steps, keep)
        assert (steps - wide.held) % 2 == 0
        left = classes - steps * wide.cols
        lanes = wide.cols // wide.vector
        assert lanes * wide.rest >= left - (wide.vector - 1)
        assert wide.rest == 2 or lanes * wide.rest < 2 * left
        assert wide.resident * wide.num_warps == 16
