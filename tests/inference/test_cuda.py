"""The service and its predictor on a CUDA device that is not there (`fake_cuda.py`).

Long because it is one device and one way onto it: labels, memory, batches, then the whole service.
"""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import nibabel
import numpy as np
import pytest
import torch
from conftest import errors_of, metadata_of, save_nifti, smooth_hu, trained_looking_network
from fake_cuda import aten

from inference.command import main
from inference.cuda import driver
from inference.cuda import runtime as cuda
from inference.device import choose_device
from inference.network.weights import save_weights
from inference.prediction import Predictor
from inference.startup import CANNOT_START

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
WINDOW = (-400.0, 500.0)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(scope="module")
def network():
    return trained_looking_network(8, seed=1)


@pytest.fixture(scope="module")
def hu():
    return smooth_hu((7, 40, 52))


def predictor_of(network, device, *, dtype=torch.float32, batch_size=None, **options):
    changes = {name: options.pop(name) for name in ("matrix_reduction",) if name in options}
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return Predictor(
        [(state, metadata_of(network, **changes))], device,
        dtype=dtype, batch_size=batch_size, lanes=1, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(network, hu):
    """Labels by the CPU, by reduction."""
    return {
        reduction: predictor_of(network, CPU, matrix_reduction=reduction).predict(hu, window=WINDOW)
        for reduction in (1, 2)
    }


@pytest.mark.slow
@pytest.mark.parametrize("choices", [{}, {"fused_kernels": False}, {"dense_borders": False}])
@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_labels_are_those_of_the_cpu(
    network, hu, expected, cuda_device, reduction, batch_size, choices
):
    cuda_device()
    predictor = predictor_of(
        network, CUDA, matrix_reduction=reduction, batch_size=batch_size, **choices
    )
    done = []
    labels = predictor.predict(hu, window=WINDOW, on_slices=done.append)
    assert (labels == expected[reduction]).mean() >= 0.9999
    assert len(np.unique(labels)) >= 7
    assert sum(done) == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [*("uint8", "int8", "uint16", ">i2", "int32", "int64"), *("float16", "float64")]
)
def test_every_type_of_voxels(network, hu, cuda_device, dtype):
    voxels = (hu // 8 + (64 if "u" in dtype else 0)).clip(-100, 120).astype(dtype)
    expected = predictor_of(network, CPU).predict(voxels, window=(-50, 60))
    cuda_device()
    labels = predictor_of(network, CUDA).predict(voxels, window=(-50, 60))
    assert (labels == expected).mean() >= 0.9999


@pytest.mark.parametrize("reduction", [1, 2])
def test_only_voxels_go_up_and_only_labels_come_down(network, hu, cuda_device, reduction):
    """And the host waits for nothing but the labels, one batch after it has launched the next."""
    device = cuda_device()
    predictor = predictor_of(network, CUDA, matrix_reduction=reduction, batch_size=2)
    traffic = device.traffic
    traffic.uploads.clear(), traffic.downloads.clear(), traffic.waits.clear()
    launched = []
    predictor.network.register_forward_pre_hook(
        lambda module, inputs: launched.append(list(traffic.waits))
    )
    predictor.predict(hu, window=WINDOW)
    large = [(shape, dtype) for shape, dtype in traffic.uploads if len(shape) > 1]
    assert large == [((2, 40, 52), torch.int16)] * 4
    # Of the last batch's two slices one has its label already.
    assert traffic.downloads == [((2, 40, 52), torch.uint8)] * 3 + [((1, 40, 52), torch.uint8)]
    assert traffic.waits == ["event"] * 4
    assert [len(waits) for waits in launched] == [0, 0, 1, 2]


def test_the_network_runs_in_fp16_and_fused(network, hu, cuda_device):
    device = cuda_device()
    predictor = predictor_of(network, CUDA, dtype=None)
    assert {weight.dtype for weight in predictor.network.parameters()} == {torch.float16}
    device.operators.clear()
    labels = predictor.predict(hu, window=WINDOW)
    batches = -(-7 // predictor.default_batch_size((40, 52), 1))
    assert device.operators.count(aten.cudnn_convolution_add_relu) == (3 + 1) * batches
    assert device.operators.count(aten.cudnn_convolution_relu) == 20 * batches
    # What is left: a level's share of each skip, the upsampling's phases, three of the fusion, and
    # the head.
    assert device.operators.count(aten.convolution) == (4 + 4 + 3 + 1) * batches
    assert len(np.unique(labels)) >= 7


@pytest.mark.parametrize(
    "fused",
    [
        False,
        lambda operator, channels: channels > 1,  # as matrix units want them
        lambda operator, channels: operator is aten.cudnn_convolution_relu,
    ],
)
def test_where_cudnn_has_no_fused_kernel(network, hu, expected, cuda_device, fused):
    device = cuda_device(fused=fused)
    predictor = predictor_of(network, CUDA, matrix_reduction=2, batch_size=7)
    assert (predictor.predict(hu, window=WINDOW) == expected[2]).mean() >= 0.9999
    assert device.operators.count(aten.convolution) >= 9


def test_fused_kernels_that_compute_wrongly_are_not_used(network, hu, expected, cuda_device):
    device = cuda_device()
    compute = device._compute

    def without_relu(operator, arguments, options):
        if operator.overloadpacket is aten.cudnn_convolution_relu:
            return compute(aten.convolution.default, (*arguments[:6], False, [0, 0], 1), {})
        return compute(operator, arguments, options)

    device._compute = without_relu
    predictor = predictor_of(network, CUDA)
    device.operators.clear()
    assert (predictor.predict(hu, window=WINDOW) == expected[1]).mean() >= 0.9999
    assert aten.cudnn_convolution_relu not in device.operators


# Memory.


def sizes_of_batches(predictor, most, error=OUT_OF_MEMORY):
    """The sizes of the batches that the network sees from now on; larger ones raise the error."""
    sizes = []

    def refuse(module, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise error

    predictor.network.register_forward_pre_hook(refuse)
    return sizes


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
@pytest.mark.slow
def test_memory_pressure_halves_the_batch(network, hu, expected, cuda_device, error):
    cuda_device()
    predictor = predictor_of(network, CUDA, batch_size=7)
    sizes = sizes_of_batches(predictor, 2, error)
    done = []
    labels = predictor.predict(hu, window=WINDOW, on_slices=done.append)
    assert sizes == [7, 3] + [1] * 7
    assert sum(done) == 7
    assert (labels == expected[1]).mean() >= 0.9999


def test_a_lack_of_memory_is_remembered_for_slices_of_that_size(network, hu, cuda_device):
    cuda_device()
    predictor = predictor_of(network, CUDA, batch_size=6)
    sizes = sizes_of_batches(predictor, 2)
    for voxels, expected in (
        (hu[:4], [4, 2, 2]),  # a short volume says nothing of longer ones,
        (hu[:6], [6, 3, 1, 1, 1, 1, 1, 1]),
        (hu[:6], [1, 1, 1, 1, 1, 1]),
        (hu[:6, :16], [6, 3, 1, 1, 1, 1, 1, 1]),  # nor large slices of small ones
    ):
        predictor.predict(voxels, window=WINDOW)
        assert sizes == expected
        sizes.clear()


def test_a_fault_of_folding_is_not_the_devices(network, cuda_device, monkeypatch):
    cuda_device()
    monkeypatch.setattr("inference.prediction.fold", lambda _: 1 / torch.ones(2, 3).view(7))
    with pytest.raises(RuntimeError, match="shape"):
        predictor_of(network, CUDA)


def test_another_error_is_not_taken_for_a_lack_of_memory(network, hu, cuda_device):
    cuda_device()
    predictor = predictor_of(network, CUDA, batch_size=7)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    sizes = sizes_of_batches(predictor, 0, error)
    with pytest.raises(RuntimeError, match="illegal"):
        predictor.predict(hu, window=WINDOW)
    assert sizes == [7]


def test_memory_is_freed_when_nothing_holds_the_batch(network, hu, cuda_device, monkeypatch):
    cuda_device()
    predictor = predictor_of(network, CUDA, batch_size=4)
    held, alive = [], []

    def refuse(module, inputs):
        if len(inputs[0]) > 1:
            held.append(weakref.ref(inputs[0]))
            raise torch.OutOfMemoryError("CUDA out of memory")

    predictor.network.register_forward_pre_hook(refuse)
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: alive.append([ref() is not None for ref in held])
    )
    predictor.predict(hu, window=WINDOW)
    assert alive == [[False], [False, False]]


@pytest.mark.parametrize(("total", "given", "fraction"), [(4000, 2000, 0.375), (1500, 2000, None)])
def test_the_allocators_limit(network, cuda_device, total, given, fraction):
    """Of 2,000 MB the context's allowance is taken; of a smaller card what is free."""
    device = cuda_device(total_mb=total, context_mb=400)
    predictor = predictor_of(network, CUDA, gpu_memory_mb=given)
    ((found, index),) = device.traffic.fractions
    assert index == 0
    if fraction is None:
        weights = sum(weight.nbytes for weight in predictor.network.parameters()) / 2**20
        fraction = (1100 + weights) / 1500
    assert found == pytest.approx(fraction)


def test_too_little_memory_is_refused_with_the_least_that_works(network, cuda_device):
    cuda_device()
    with pytest.raises(ValueError, match="300 MB of GPU memory are too little") as refused:
        predictor_of(network, CUDA, gpu_memory_mb=300)
    least = int(str(refused.value).split("at least ")[1].split()[0])
    # The context's 500, the weights' 1 and 24 of a slice: 16 bytes and 2 x 8 channels x 5 maps.
    assert least == 500 + 26
    predictor = predictor_of(network, CUDA, gpu_memory_mb=least)
    assert predictor.default_batch_size((512, 512), 1) == 1
    with pytest.raises(ValueError, match="too little"):
        predictor_of(network, CUDA, gpu_memory_mb=least - 1)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("CUDA error: no kernel image is available for this\n…"), "TORCH_INDEX"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "memory"),
        (RuntimeError("CUDA error: out of memory"), "memory"),
        (RuntimeError("The NVIDIA driver on your system is too old (found 11040)."), "11040"),
        (RuntimeError("CUDA error: unknown error\nmore"), "unknown error"),
        (AssertionError("Torch not compiled with CUDA enabled"), "not compiled"),
    ],
)
def test_a_device_that_cannot_be_made_ready(network, cuda_device, monkeypatch, error, named):
    cuda_device()

    def fail(device):
        raise error

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    with pytest.raises(ValueError, match="cuda:0 cannot be used") as refused:
        predictor_of(network, CUDA)
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_the_device_is_the_threads_that_uses_it(network, hu, cuda_device, monkeypatch):
    """CUDA's current device is a thread's own; the cluster's workers predict in another."""
    cuda_device()
    chosen = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device))
    )
    predictor = predictor_of(network, CUDA)
    assert (threading.get_ident(), CUDA) in chosen
    chosen.clear()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(threading.get_ident).result()
        pool.submit(predictor.predict, hu[:2], window=WINDOW).result()
    assert (other, CUDA) in chosen


def test_devices_have_their_index(cuda_device):
    cuda_device()
    assert choose_device("cuda") == choose_device("auto") == choose_device("cuda:0") == CUDA
    assert choose_device("cuda").index == 0
    with pytest.raises(ValueError, match=r"no CUDA device cuda:1: torch sees 1$"):
        choose_device("cuda:1")


@pytest.mark.parametrize(
    ("version", "told"),
    [(None, "no NVIDIA driver"), ((11, 4), "for CUDA 11.4"), ((99, 0), "the NVIDIA driver shows")],
)
def test_why_there_is_no_device(monkeypatch, version, told):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "cuda_version", lambda: version)
    with pytest.raises(ValueError, match="no CUDA device cuda: torch sees 0: .*" + told):
        choose_device("cuda")


# The batch size.


def test_batch_sizes_within_memory(network, cuda_device):
    """A slice of 512x512 takes 4 MB, and 2 bytes x 8 channels x 5 maps = 20 MB, of 256x256 5."""
    cuda_device()
    predictor = predictor_of(network, CUDA)
    weights_mb = sum(weight.nbytes for weight in predictor.network.parameters()) / 2**20
    for memory_mb, whole, reduced in ((0, 1, 1), (73, 3, 8), (99, 4, 11), (8000, 4, 16)):
        predictor.memory_mb = weights_mb + memory_mb
        assert predictor.default_batch_size((512, 512), 1) == whole
        assert predictor.default_batch_size((512, 512), 2) == reduced
    predictor = predictor_of(network, CPU)
    assert predictor.default_batch_size((512, 512), 1) == 1


# The service.


@pytest.mark.slow
@pytest.mark.parametrize(("device", "reduction"), [("cuda", 1), ("auto", 2), ("cuda:0", 2)])
def test_the_whole_service(
    folders, tmp_path, ct, network, cuda_device, monkeypatch, device, reduction
):
    inputs, outputs = folders
    weights = tmp_path / "w.safetensors"
    save_weights(weights, network.state_dict(), metadata_of(network, matrix_reduction=reduction))
    for name in ("a", "b"):
        save_nifti(inputs / f"{name}_0000.nii.gz", ct)
    common = ["--input", str(inputs), "--weights", str(weights)]
    # Random weights leave many voxels close to a tie: in half precision components would differ.
    monkeypatch.setattr("inference.prediction.choose_dtype", lambda device: torch.float32)
    assert main([*common, "--output", str(tmp_path / "cpu"), "--device", "cpu"]) == 0

    initialised = []
    monkeypatch.setattr(driver, "initialise", lambda: initialised.append(True))
    fake = cuda_device()
    assert main([*common, "--output", str(outputs), "--device", device]) == 0
    assert initialised == [True]
    assert aten.cudnn_convolution_relu in fake.operators
    for name in ("a", "b"):
        labels, expected = (
            np.asanyarray(nibabel.load(folder / f"{name}.nii.gz").dataobj)
            for folder in (outputs, tmp_path / "cpu")
        )
        assert (labels == expected).mean() > 0.999


def test_wrong_use_of_the_device_is_one_line(run, folders, ct, cuda_device, capsys, monkeypatch):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    cuda_device()
    assert run("--device", "cuda", "--gpu-memory", "300") == 2
    assert len(errors_of(capsys)) == 1
    assert run("--device", "cuda:3") == 2
    assert capsys.readouterr().err == "error: no CUDA device cuda:3: torch sees 1\n"
    with monkeypatch.context() as full:
        full.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1 << 31))
        assert run("--device", "cuda") == CANNOT_START
        assert len(errors_of(capsys)) == 1


# The fake device itself: what it is for must fail on it.


def test_what_a_card_refuses_fails_on_the_fake_one(cuda_device):
    cuda_device()
    here, there = torch.ones(2, 3), torch.ones(2, 3, device=CUDA)
    with pytest.raises(RuntimeError, match="two devices"):
        here + there
    with pytest.raises(ValueError, match="index"):
        torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))
    with pytest.raises(NotImplementedError):
        torch.nn.functional.avg_pool2d(torch.ones(1, 1, 4, 4, device=CUDA, dtype=torch.int16), 2)
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    assert torch.empty(3, device=CUDA).cpu().isnan().all()
    pinned = torch.zeros(2, 3, pin_memory=True)
    pinned.copy_(there, non_blocking=True)
    assert pinned.isnan().all()  # not there yet
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert (pinned == 1).all()
