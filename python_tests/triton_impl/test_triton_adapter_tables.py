"""The tiles of routed_adapter's Triton kernels: shipped for every GPU, or measured; what stays on the chip."""

# ruff: noqa: E402 (the module is skipped before it imports triton)

import pytest
from triton_spy import DTYPES, needs_triton

needs_triton()


from adamix_kernels.ops._triton_tables import lookup
from adamix_kernels.ops.routed_adapter.triton_impl import tables

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", tables.TABLES)
def test_every_shape_class_has_a_configuration_on_every_gpu(kernel, dtype):
    for capability in (0, 80, 86, 89, 90, 100, 103, 120):
        for width in (1 << n for n in range(4, 11)):
            rows, cols, warps, stages = tables.config(kernel, capability, dtype.itemsize, width)
            assert min(rows, cols) >= 16
            assert rows & (rows - 1) == cols & (cols - 1) == 0
            assert warps in (4, 8)
            assert 1 <= stages <= 5


def test_a_measured_table_goes_before_the_shipped_one(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    file.write_text('{"adapter_forward_kernel": {"90": {"2x16": [128, 32, 8, 5]}}}')
    monkeypatch.setenv("ADAMIX_TRITON_TABLE", str(file))
    shipped = tables.TABLES["adapter_forward_kernel"]
    assert lookup("adapter_forward_kernel", shipped, 90, 2, 16) == (128, 32, 8, 5)
    for arch, width in ((90, 32), (80, 16), (120, 16)):
        assert lookup("adapter_forward_kernel", shipped, arch, 2, width) == shipped[80][2, width]


def test_a_measured_tile_is_kept_where_its_rows_fit_in_registers(tmp_path, monkeypatch):
    kernel = "adapter_forward_kernel"
    kept = tables.kept_tile(90, 2, 16, 1024)
    assert tables.row_tile(kernel, 90, 2, 16, 1024, True) == (kept, True)
    assert tables.row_tile(kernel, 90, 2, 16, 1024, False) == (tables.config(kernel, 90, 2, 16), False)
    for tile, want in (((16, 128, 4, 2), ((16, 128, 4, 2), True)), ((64, 64, 4, 4), (kept, True))):
        file = tmp_path / f"{tile[0]}.json"
        file.write_text(f'{{"{kernel}": {{"90": {{"2x16": {list(tile)}}}}}}}')
        monkeypatch.setenv("ADAMIX_TRITON_TABLE", str(file))
        assert tables.row_tile(kernel, 90, 2, 16, 1024, True) == want
        assert tables.row_tile(kernel, 90, 2, 16, 1024, False) == (tile, False)


@pytest.mark.parametrize("capability", [0, 80, 86, 89, 90, 100, 120])
def test_what_stays_fits_in_the_registers_and_is_not_read_too_often(capability):
    for width in (16, 32, 64, 128):
        for hidden in (0, 64, 320, 768, 1024, 1280, 2048, 4096, 8192, 100):
            tile = tables.kept_tile(capability, 2, width, hidden)
            if tile is None:
                continue
            assert hidden % tile.cols == 0 < hidden
            assert tile.rows * hidden * 2 <= 512 * 32 * tile.num_warps
            assert 2 * tile.rows >= width
        assert tables.kept_tile(capability, 4, width, 1024) is None
