"""The process that `predict.sh` starts: where it runs, what it imports, what a terminal sees."""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import save_nifti, stored

from inference import __version__
from inference.startup import CANNOT_START

ROOT = Path(__file__).parents[2]


def in_a_new_process(*arguments, **environment):
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def python_with(folder, option):
    """A Python that is called with an option."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {option} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_predict_sh_and_what_it_imports(folders, weights_file, ct, tmp_path):
    inputs, outputs = folders
    save_nifti(inputs / "a_0000.nii.gz", ct)
    spy = python_with(tmp_path, "-v")
    ended = in_a_new_process(
        "sh", "predict.sh", "--input", str(inputs), "--output", str(outputs),
        "--weights", str(weights_file), PYTHON=spy,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert stored(outputs / "a.nii.gz").shape == ct.shape
    assert re.search(r"^1 of 1 cases in .* s: .*outputs$", ended.stdout.splitlines()[-1])
    if "NVIDIA" not in ended.stderr:
        assert ended.stderr.count("No CUDA device found: running on the CPU") == 1
    modules = {
        line.split("'")[1] for line in ended.stderr.splitlines() if line.startswith("import '")
    }
    assert "torch.nn.functional" in modules
    assert "torch._meta_registrations" not in modules
    imported = {module.split(".")[0] for module in modules}
    assert {"inference", "torch", "nibabel"} <= imported
    # Not scipy, pynvml and tqdm: nibabel and torch import them where they are installed.
    others = {"torchvision", "skimage", "matplotlib", "benchmark", "training", "psutil"}
    assert not imported & (others | {"pytest", "PIL", "pydicom", "highdicom", "gdcm"})
    assert not any(module.startswith("inference.dicom") for module in modules)


@pytest.mark.slow
def test_what_is_left_out_of_torch_can_be_imported_afterwards():
    script = """if True:
        import sys
        from inference.startup import import_torch
        import_torch()
        import torch
        assert "torch._meta_registrations" not in sys.modules
        from torch import _meta_registrations
        # Of an operator whose shape rule is written in Python.
        image = torch.empty(1, 1, 9, 9, device="meta")
        print(torch.nn.functional.conv2d(image, image[..., :3, :3]).shape)
        import_torch()
        assert torch._meta_registrations is _meta_registrations
    """
    ended = in_a_new_process(sys.executable, "-c", script)
    assert ended.stdout == "torch.Size([1, 1, 7, 7])\n", ended.stderr


@pytest.mark.slow
def test_a_terminal_sees_a_bar(folders, weights_file, ct):
    inputs, outputs = folders
    save_nifti(inputs / "a_0000.nii.gz", ct)
    shown, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [sys.executable, "-m", "inference", "--device", "cpu"]
    command += ["--input", str(inputs), "--output", str(outputs), "--weights", str(weights_file)]
    ended = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody is left to write to it
        while part := os.read(shown, 4096):
            seen += part
    os.close(shown)
    assert ended.wait() == 0
    assert b"/21 [" in seen  # slices done of slices
    assert b"[1/1] a: done" in seen


@pytest.mark.slow
def test_relative_paths_count_from_the_callers_folder(folders, weights_file, ct, tmp_path):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    (tmp_path / "inference").mkdir()  # what the caller's folder holds is not imported
    (tmp_path / "inference" / "__init__.py").write_text("raise SystemExit(99)")
    ended = subprocess.run(
        ["sh", str(ROOT / "predict.sh"), "--input", "inputs", "--output", "outputs",
         "--weights", os.path.relpath(weights_file, tmp_path), "--device", "cpu"],
        cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable}, check=False,
    )  # fmt: skip
    assert ended.returncode == 0
    assert stored(folders[1] / "a.nii.gz").shape == ct.shape


def test_help_needs_no_package_and_a_missing_one_is_one_line(tmp_path):
    bare = python_with(tmp_path, "-S")  # without site-packages
    ended = in_a_new_process("sh", "predict.sh", "--help", PYTHON=bare)
    assert ended.returncode == 0, ended.stderr
    assert "--keep-existing" in ended.stdout
    ended = in_a_new_process("sh", "predict.sh", "--version", PYTHON=bare)
    assert (ended.returncode, ended.stdout) == (0, f"abdoseg {__version__}\n")
    ended = in_a_new_process("sh", "predict.sh", PYTHON=bare)
    assert ended.returncode == CANNOT_START
    (line,) = ended.stderr.splitlines()
    assert "package" in line and "make setup" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "raised"),
    [
        ("numpy", "ImportError('libstdc++.so.6: version not found')"),
        ("isal", "OSError('cannot map')"),
        ("torch", "OSError('libtorch_cpu.so: failed to map segment from shared object')"),
        ("torch", "MemoryError()"),
    ],
)
def test_a_library_that_cannot_be_loaded_is_one_line(folders, ct, tmp_path, module, raised):
    save_nifti(folders[0] / "a_0000.nii.gz", ct)
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(f"raise {raised}")
    places = ("--input", str(folders[0]), "--output", str(folders[1]), "--quiet")
    command = (sys.executable, "-m", "inference", *places)
    ended = in_a_new_process(*command, PYTHONPATH=str(tmp_path))
    assert ended.returncode == CANNOT_START
    assert len(ended.stderr.splitlines()) == 1, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", ["CDPATH", "link", "colon", "PYTHONPATH", "PYTHONHOME"])
def test_predict_sh_runs_what_lies_beside_it(tmp_path, place):
    """Whatever the caller's shell, path and module system say."""
    script, environment = ROOT / "predict.sh", {}
    if place == "CDPATH":
        script, environment = "tests/../predict.sh", {"CDPATH": f".:{tmp_path}"}
    elif place == "link":
        script = tmp_path / "segment it"
        script.symlink_to(ROOT / "predict.sh")
    elif place == "colon":
        script = tmp_path / "a:b" / "predict.sh"
        script.parent.mkdir()
        shutil.copy(ROOT / "predict.sh", script)
        (script.parent / "inference").symlink_to(ROOT / "inference")
    else:
        (tmp_path / "argparse.py").write_text("raise ImportError('of another Python')")
        environment[place] = str(tmp_path)
    ended = in_a_new_process("sh", str(script), "--version", **environment)
    assert (ended.returncode, ended.stdout) == (0, f"abdoseg {__version__}\n"), ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("package", ["inference", "cluster", "training", "benchmark"])
def test_a_terminal_that_lacks_letters_ends_nothing(package):
    script = f"""if True:
        import atexit, runpy, sys
        atexit.register(lambda: print("\\u2026"))
        sys.argv[1:] = ["--help"]
        runpy.run_module({package!r}, run_name="__main__")
    """
    for locale in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}):
        environment = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **locale}
        ended = in_a_new_process(sys.executable, "-c", script, **environment)
        assert ended.stdout.splitlines()[-1] == "\\u2026", ended.stderr


@pytest.mark.slow
def test_help_and_wrong_usage_do_not_wait_for_torch(tmp_path):
    spy = python_with(tmp_path, "-X importtime")
    for arguments, code in ((["--help"], 0), (["--input", "nowhere"], 2)):
        ended = in_a_new_process("dash", "predict.sh", *arguments, PYTHON=spy)
        assert ended.returncode == code
        assert "inference.volume" in ended.stderr
        assert " torch" not in ended.stderr
