"""The checkpoints' part in its small size, and that each of its figures can fail."""

from pathlib import Path

import pytest
import torch

from adamix_kernels import save_adamix
from adamix_kernels.convert import _official_format
from adamix_kernels.models import _files
from reliability import checkpoints
from reliability.checkpoints import damage, full_disk, kills, pickles
from reliability.small_models import adapted, digest

KIND = "BERT, adapters"


@pytest.mark.nightly
def test_the_part_in_its_small_size():
    assert [figure for figure in checkpoints.run("small") if not figure.passed] == []


def test_a_header_without_its_digest_is_a_wrong_model(tmp_path, monkeypatch):
    save_adamix(adapted(KIND), tmp_path)
    look = damage._loads(KIND, tmp_path)
    monkeypatch.setattr(_files, "unsealed", lambda values, _where: {k: v for k, v in values.items() if k != "sha256"})
    found = damage.sweep(tmp_path / "adamix_checkpoint.json", look, 0, 256)
    assert found["a wrong model"] > 0


def test_an_official_file_without_its_checksums_is_a_wrong_model(tmp_path, monkeypatch):
    path = tmp_path / "official.bin"
    torch.save(damage.official_state(KIND), path)
    look = damage._loads_official(KIND, path)
    monkeypatch.setattr(_official_format, "_check_sums", lambda _path: True)
    assert damage.sweep(path, look, 0, 100)["a wrong model"] > 0


def test_damages_are_all_different_from_the_file():
    found = list(damage.damages(b"0123456789", 5, 20))
    assert [len(one) for one in found[:5]] == [0, 2, 4, 6, 9]
    assert all(
        bin(int.from_bytes(one, "big") ^ int.from_bytes(b"0123456789", "big")).count("1") == 1 for one in found[5:]
    )


def test_a_loader_that_runs_pickles_is_found_out(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "model.bin"
    torch.save(pickles.payloads(marker)["os.mkdir"], path)

    def careless(_model, path):
        torch.load(path, weights_only=False)
        raise ValueError(path)

    assert not pickles.is_refused(path, marker, careless)
    assert pickles.is_refused(path, marker)


def test_a_torn_checkpoint_is_not_whole(tmp_path):
    models = {digest(adapted(KIND, 1)): 1}
    save_adamix(adapted(KIND, 1), tmp_path)
    assert kills.whole(tmp_path, models)
    save_adamix(adapted(KIND, 2), tmp_path)
    assert not kills.whole(tmp_path, models)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert not kills.whole(tmp_path, models)


def test_a_save_that_removes_the_old_one_first_is_found_out(monkeypatch):
    def careless(model, folder):
        for file in filter(Path.is_file, list(folder.iterdir())):
            file.unlink()
        return save_adamix(model, folder)

    monkeypatch.setattr(full_disk, "save_adamix", careless)
    assert not full_disk._refused_calls().passed
