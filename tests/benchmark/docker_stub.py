"""A stand-in for the `docker` command line: the questions and orders that `benchmark` has for it.

DOCKER_STUB names a folder. An image is a folder `images/NAME` with a `predict.sh` in it; an archive
is a tar file with a `manifest.json` and the `predict.sh`, or the text of an image's name; a
container is a process group with that script's copy beside links to the mounted folders. Every
order is written to `orders`, one JSON list a line. A container finds the options that it was
started with in CONTAINER_OPTIONS. With DOCKER_STUB_SLOW it takes that many seconds to find a
container's process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

stub = Path(os.environ["DOCKER_STUB"])
arguments = sys.argv[1:]
with (stub / "orders").open("a") as orders:
    print(json.dumps(arguments), file=orders)


def image_folder(image: str) -> Path:
    return stub / "images" / image.removesuffix(":latest")


def run_container() -> int:
    if "/bin/bash" not in arguments:
        print("docker: no such program in a stand-in's image.")
        return 127
    image = arguments[arguments.index("/bin/bash") - 1]
    if (refused := image_folder(image) / "refused").exists():
        print(refused.read_text(), end="")
        print("docker: Error response from daemon: could not select device driver.")
        return 125
    name = arguments[arguments.index("--name") + 1]
    mounts = [arguments[n + 1] for n, word in enumerate(arguments) if word == "-v"]
    place = Path(tempfile.mkdtemp())
    shutil.copy(image_folder(image) / "predict.sh", place)
    for mount in mounts:
        host, inside = mount.split(":")[:2]
        (place / Path(inside).name).symlink_to(host)
    container = subprocess.Popen(
        arguments[arguments.index("/bin/bash") :],
        cwd=place,
        env=os.environ | {"CONTAINER_OPTIONS": " ".join(arguments)},
        start_new_session=True,
    )
    pid_file = stub / f"{name}.pid"
    pid_file.write_text(str(container.pid))
    (stub / f"{name}.started").touch()
    if "--label" in arguments:
        label = arguments[arguments.index("--label") + 1].partition("=")[2]
        (stub / f"{name}.label").write_text(label)
    code = container.wait()
    pid_file.unlink(missing_ok=True)
    return code if code >= 0 else 128 - code


def remove_container() -> int:
    pid_file = stub / f"{arguments[-1]}.pid"
    if not pid_file.exists():
        return 1
    os.killpg(int(pid_file.read_text()), signal.SIGKILL)
    pid_file.unlink()
    return 0


def load(archive: str) -> None:
    if not tarfile.is_tarfile(archive):
        print("Loaded image: " + Path(archive).read_text(encoding="utf-8"))
        return
    with tarfile.open(archive) as tar:
        (entry,) = json.load(tar.extractfile("manifest.json"))
        for tag in entry["RepoTags"]:
            image_folder(tag).mkdir(parents=True, exist_ok=True)
            (image_folder(tag) / "predict.sh").write_bytes(tar.extractfile("predict.sh").read())
            print("Loaded image: " + tag)


def remove_image(image: str) -> None:
    if not image_folder(image).is_dir():
        sys.exit("Error: No such image: " + image)
    shutil.rmtree(image_folder(image))


match arguments:
    case ["image", "inspect", *_, image]:
        if not image_folder(image).is_dir():
            sys.exit("Error: No such image: " + image)
        if "{{json .}}" in arguments:
            print(json.dumps({"Size": 10**9, "Os": "linux", "Architecture": "amd64"}))
        else:
            print("sha256:" + "0" * 64)
    case ["version", *_]:
        print("stand-in")
    case ["load", "-i", archive]:
        load(archive)
    case ["image", "rm", "-f", image]:
        remove_image(image)
    case ["info", *_]:
        print(stub)
    case ["container", "run", *_]:
        sys.exit(run_container())
    case ["container", "inspect", *_, name]:
        time.sleep(float(os.environ.get("DOCKER_STUB_SLOW", "0")))
        pid_file = stub / f"{name}.pid"
        if not pid_file.exists():
            sys.exit("Error: No such container: " + name)
        print(pid_file.read_text())
    case ["container", "rm", "-f", _]:
        sys.exit(remove_container())
    case ["container", "ls", *_]:
        labelled = [word.partition("=")[2] for word in arguments if word.startswith("label=")]
        for pid_file in stub.glob("*.pid"):
            label = pid_file.with_suffix(".label")
            print(pid_file.stem, *(f"{key}={label.read_text()}" for key in labelled), sep="\t")
    case ["events", *_] if "event=start" in arguments:
        name = next(word for word in arguments if word.startswith("container=")).split("=")[1]
        if (stub / f"{name}.started").exists():
            print("start")
    case ["events", *_]:
        pass
    case _:
        sys.exit(f"docker stand-in: {arguments}?")
