"""Small networks and volumes that the tests share."""

import contextlib
import gc
import itertools
import os
import signal
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from inference.command import main
from inference.memory import MemoryBudget
from inference.network.model import AttentionUNet
from inference.network.weights import DEMONSTRATION_WEIGHTS, WeightsMetadata, save_weights
from inference.options import parse_arguments
from inference.phases import PhaseTimer
from inference.prediction import Predictor
from inference.records.provenance import Provenance
from inference.service import Observer, Service

torch.set_num_threads(1)  # the tests' networks are too small to be worth a second

# A shell that starts the tests in its background makes them, and what they start, deaf to Ctrl-C;
# nohup does so to SIGHUP, which the commands then ignore as they should.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SHARED = Path(__file__).parents[2] / "shared"
"""Real CT and reference scores, beside the project on the machines that have them."""


def assert_same_grid(volume: Path, label_map: Path) -> None:
    """A label map has its volume's shape, affine, codes and units, and only our labels."""
    before, after = nibabel.load(volume), nibabel.load(label_map)
    assert after.shape == before.shape
    assert after.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(after.affine, before.affine)
    for code in ("sform_code", "qform_code", "xyzt_units"):
        assert after.header[code] == before.header[code]
    assert set(np.unique(np.asanyarray(after.dataobj))) <= set(range(15))


def trained_looking_network(base_channels: int = 8, seed: int = 0, **arguments) -> AttentionUNet:
    """A network with non-trivial normalisation statistics, whose labels are all used."""
    torch.manual_seed(seed)
    network = AttentionUNet(base_channels=base_channels, **arguments).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.2, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    with torch.no_grad():
        slices = torch.randn(2, 3, 64, 64)
        logits = network(slices).transpose(0, 1).flatten(1)
        spread = logits.std(dim=1)
        network.head.weight /= spread[:, None, None, None]
        network.head.bias.sub_(logits.mean(dim=1)).div_(spread)
    return network


def metadata_of(network: AttentionUNet, **changes) -> WeightsMetadata:
    fields = {
        "base_channels": network.head.in_channels,
        "num_classes": network.head.out_channels,
        "intensity_mean": 20.0,
        "intensity_std": 150.0,
        "trained_on": "nothing: random weights of a test",
        "licence": "MIT",
        "date": "2026-01-01",
        "revision": "test",
    }
    return WeightsMetadata(**{**fields, **changes})


@pytest.fixture(scope="session")
def weights_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    network = trained_looking_network()
    save_weights(path, network.state_dict(), metadata_of(network))
    return path


@pytest.fixture
def ct() -> np.ndarray:
    """HU, (i, j, k) toward right, anterior, superior; smooth, so that labels form regions."""
    rng = np.random.default_rng(7)
    coarse = torch.from_numpy(rng.normal(0, 300, (1, 1, 7, 6, 5)))
    fine = torch.nn.functional.interpolate(coarse, size=(40, 33, 21), mode="trilinear")
    return (fine[0, 0].numpy() + rng.normal(0, 20, (40, 33, 21))).astype(np.int16)


RAS_AFFINE = np.array([[1.5, 0, 0, -30], [0, 1.25, 0, 12], [0, 0, 4, -700], [0, 0, 0, 1.0]])

ORIENTATIONS = [
    nibabel.orientations.axcodes2ornt(tuple(codes))
    for axes in itertools.permutations(("LR", "PA", "IS"))
    for codes in itertools.product(*axes)
]
"""All 48 ways in which a file's axes can run along the patient's."""


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray = RAS_AFFINE) -> Path:
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nibabel.save(image, path)
    return path


def with_header(
    path: Path,
    array: np.ndarray,
    affine: np.ndarray = RAS_AFFINE,
    *,
    kind: type = nibabel.Nifti1Image,
    codes: tuple[int, int] = (1, 1),
    **fields,
) -> Path:
    """A file that is not compressed, by its form codes (sform, qform), some fields changed last."""
    image = kind(array, None)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, codes[1])
    image.set_sform(affine, codes[0])
    nibabel.save(image, path)
    content = bytearray(path.read_bytes())
    header = np.ndarray((), image.header.template_dtype, content)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(content)
    return path


def reoriented(array: np.ndarray, affine: np.ndarray, orientation: np.ndarray):
    """The same volume with its axes swapped and flipped, by nibabel: array and affine."""
    start = nibabel.io_orientation(affine)
    transform = nibabel.orientations.ornt_transform(start, orientation)
    turned = nibabel.orientations.apply_orientation(array, transform)
    return turned, affine @ nibabel.orientations.inv_ornt_aff(transform, array.shape)


def names_in(folder: Path) -> list[str]:
    """The names of a folder's entries."""
    return sorted(path.name for path in folder.iterdir())


def stored(path: Path) -> np.ndarray:
    """The voxels of a NIfTI file, in its own type and axes."""
    return np.asanyarray(nibabel.load(path).dataobj)


def smooth_hu(shape: tuple[int, int, int]) -> np.ndarray:
    """Random HU (slices, rows, columns), int16, that change slowly, as organs' do."""
    coarse = torch.from_numpy(np.random.default_rng(2).normal(0, 300, (1, 1, 4, 6, 5)))
    fine = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")
    return fine[0, 0].numpy().round().astype(np.int16)


class PlainLoader:
    """A loader, and its network, for `Service`: a function from voxels to labels."""

    lanes = 1

    def __init__(self, predict):
        self._predict = predict
        self.predictor = self
        self.metadata = metadata_of(trained_looking_network())
        self.provenance = Provenance(lambda: [DEMONSTRATION_WEIGHTS])

    def predict(self, voxels, **_):
        return self._predict(voxels)

    def release(self):
        pass

    def host_bytes(self, *_):
        return 0

    slice_bytes = host_bytes


def plain_service(folders, predict, memory) -> Service:
    """A service with `PlainLoader` and so many bytes of memory for cases."""
    arguments = ["--input", str(folders[0]), "--output", str(folders[1]), "--quiet"]
    options = parse_arguments(arguments)
    service = Service(options, PlainLoader(predict), Observer(), PhaseTimer())
    service.budget = MemoryBudget(memory)
    return service


def errors_of(capsys) -> list[str]:
    """The lines in which the service tells errors."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A folder of inputs, and where outputs will be."""
    (tmp_path / "inputs").mkdir()
    return tmp_path / "inputs", tmp_path / "outputs"


@pytest.fixture
def predicted(monkeypatch) -> list[str]:
    """Names of the cases that the network saw."""
    names, predict = [], Service._predict

    def seen(self, read, predictor):
        names.append(read.case.name)
        return predict(self, read, predictor)

    monkeypatch.setattr(Service, "_predict", seen)
    return names


@pytest.fixture
def every_label(monkeypatch):
    """Label maps with stripes of every label along the rows, whatever weights make of noise."""

    def predict(self, voxels, **_):
        stripes = (np.arange(voxels.shape[1]) // 2 % 15).astype(np.uint8)
        return np.array(np.broadcast_to(stripes[:, None], voxels.shape))

    monkeypatch.setattr(Predictor, "predict", predict)


@pytest.fixture
def run(folders, weights_file):
    """The service's command line on these folders, with random weights; returns its exit code."""

    def run(*arguments):
        places = ("--input", folders[0], "--output", folders[1], "--weights", weights_file)
        try:
            return main([*map(str, places), "--device", "cpu", *map(str, arguments)])
        except SystemExit as ended:
            return ended.code

    return run


@pytest.fixture
def cts(folders, ct):
    """Call it with names for CTs in the folder of inputs; returns their paths."""

    def save(*names, array=ct):
        return [save_nifti(folders[0] / f"{name}_0000.nii.gz", array) for name in names]

    return save


def pytest_collection_finish():
    """Prepare a process that runs tests."""
    gc.freeze()  # or the collector would look through torch's objects again and again
    os.environ.pop("PYTHONWARNDEFAULTENCODING", None)  # what the tests start would print it


@pytest.hookimpl(tryfirst=True)  # before the tests of `-m "not slow"` are chosen
def pytest_collection_modifyitems(items):
    """Mark what runs on fake CUDA as slow: torch's fake tensors alone take two seconds to load."""
    for item in items:
        if "cuda_device" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def cuda_device(monkeypatch):
    """Call it for a `FakeCuda` on which everything runs that says cuda:0, until the test ends."""
    from fake_cuda import FakeCuda, entered

    with contextlib.ExitStack() as stack:

        def make(**options) -> FakeCuda:
            device = FakeCuda(**options)
            stack.enter_context(entered(device, monkeypatch))
            return device

        yield make
