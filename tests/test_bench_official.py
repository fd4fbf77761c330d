"""The bench of the official code, on a stand-in for its clone: the same names over this project's own reference."""

import json

import pytest
import torch

from bench import clone, official
from fsr_fast import reference
from fsr_fast.errors import UserError
from tests import helpers
from tests.official_clone import write_clone


def test_a_folder_that_is_no_clone_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--path: .* has no train_voc\.py"):
        official.main(["--path", str(tmp_path)])


def test_a_training_without_iterations_is_refused(tmp_path):
    with pytest.raises(UserError, match="--iterations: 0; expected 1 or more"):
        official.main(["--path", str(write_clone(tmp_path)), "--iterations", "0"])


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    pictures = [str(tmp_path / f"{number}.jpg") for number in range(4)]
    with pytest.raises(UserError, match=r"--pictures: .*0\.jpg cannot be read"):
        official.main(["--path", str(write_clone(tmp_path)), "--pictures", *pictures])


def test_the_exact_filter_gives_the_energy_of_the_reference():
    draw = helpers.generator()
    images, maps = 255 * torch.rand(2, 3, 6, 5, generator=draw), torch.rand(2, 4, 6, 5, generator=draw).softmax(1)
    labels = torch.full((2, 6, 5), 255, dtype=torch.uint8)  # the gate is open everywhere
    out = torch.zeros_like(maps).flatten().numpy()
    clone.exact_filter().bilateralfilter_batch(images.numpy().ravel(), maps.numpy().ravel(), out, 2, 4, 6, 5, 15, 50)
    expected = reference.dense_energy(maps.double(), images.double(), labels).item()
    found = -(maps.flatten().double() @ torch.from_numpy(out).double()).item() / 2
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    found = {}
    other = {'0.2 * losses["aff"]': '0.3 * losses["aff"]'}
    for name, change, iterations in (("faithful", {}, "3"), ("other", other, "1")):
        path = write_clone(folder / name, **change)
        arguments = ["--path", str(path), "--iterations", iterations, "--json", str(folder / f"{name}.json")]
        official.main(arguments)
        found[name] = json.loads((folder / f"{name}.json").read_text())["differences"]
    return found


def test_the_same_maths_differs_by_rounding_alone(differences):
    assert {name: value for name, value in differences["faithful"].items() if value > 1e-6} == {}
    for part in ("network: ", "operation: ", "loop: loss "):
        assert any(name.startswith(part) for name in differences["faithful"])
    assert "loop: loss energy" in differences["faithful"]  # after its start, and so is L_seg


def test_other_maths_shows_in_the_table(differences):
    assert differences["other"]["loop: gradients"] > 1e-3
    assert differences["other"]["network: CAM"] < 1e-6
