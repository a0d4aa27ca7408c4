"""Read the pixels of DICOM files: native ones in threads, compressed ones in processes.

The decoders are C and C++ that damaged data can crash (GDCM did so at 2 of 150 damaged JPEG
streams), and hold the interpreter's lock. So each thread that reads a compressed series has a
process to decode in: this module's `main`, which reads requests from a socket and writes results
as bytes. They are no pickles: a decoder that was broken into must not reach the parent.
"""

import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import get_decoder, iter_pixels
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ..memory import cpu_limit
from ..volume import VolumeError
from .slices import Slice

THREADS = min(4, cpu_limit())
"""Files of a series read at once."""

_DECODER_BYTES = 4 << 30  # address space of a decoding process
_DECODER_SECONDS = 60  # for one slice
_pool, _of_thread = ThreadPoolExecutor(THREADS), threading.local()
_PLUGINS = ("pyjpegls", "pillow", "gdcm", "pydicom")  # the fastest first


class DecoderError(ValueError):
    """Compressed pixels that cannot be decoded."""


class Decoder:
    """A process that decodes; started when it is needed, and again after it crashed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def decode(self, slices: list[Slice]) -> Iterator[np.ndarray]:
        """Yield the pixels of slices of one file, each (rows, columns), integers.

        Raises:
            DecoderError: they cannot be decoded.
        """
        if self._process is None:
            self._start()
        try:
            file = replace(slices[0].file, path=slices[0].file.path.absolute())
            self._connection.send((file, [one.frame for one in slices]))
            for one in slices:
                if not self._connection.poll(_DECODER_SECONDS):
                    raise EOFError
                dtype, content = self._connection.recv_bytes(), self._connection.recv_bytes()
                if not dtype:
                    break
                yield np.frombuffer(content, dtype.decode()).reshape(one.rows, one.columns)
            else:
                return
        except BaseException as error:  # it crashed, or has more to send than is wanted
            self.close()
            if isinstance(error, (OSError, EOFError)):
                raise DecoderError("the decoder crashed") from None
            raise
        raise DecoderError(content.decode())

    def _start(self) -> None:
        self._connection, other = Pipe()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-E", "-m", f"{__package__}.pixels", str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],
                start_new_session=True,  # Ctrl-C is for the service, which ends this
            )

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            self._connection.close()
            process.kill()
            process.wait()


def main() -> None:
    """Decode what comes from the socket whose number is the argument, until it is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (_DECODER_BYTES, _DECODER_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            file, frames = connection.recv()
        except EOFError:
            return
        try:
            with file.open() as stream:
                dataset = pydicom.dcmread(stream, force=True)
            decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
            plugin = next(name for name in _PLUGINS if name in decoder.available_plugins)
            for pixels, _ in decoder.iter_array(
                dataset, indices=frames, raw=True, decoding_plugin=plugin
            ):
                connection.send_bytes(pixels.dtype.str.encode())
                connection.send_bytes(pixels.tobytes())
        except Exception as error:
            connection.send_bytes(b"")
            connection.send_bytes(type(error).__name__.encode())


def _pixels(slices: list[Slice]) -> Iterator[np.ndarray]:
    """Yield the pixels of slices of one file, each (rows, columns)."""
    with slices[0].file.open() as stream:
        dataset = pydicom.dcmread(stream, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:  # a file without preamble
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        yield from iter_pixels(dataset, indices=[one.frame for one in slices], raw=True)
        return
    if not hasattr(_of_thread, "decoder"):
        _of_thread.decoder = Decoder()
    yield from _of_thread.decoder.decode(slices)


def value_type(slices: tuple[Slice, ...]) -> np.dtype:
    """Return the type of a volume: that of the files, or float32, in HU, where slices differ."""
    kinds = {(one.slope, one.intercept, one.bits, one.signed) for one in slices}
    if len(kinds) > 1:
        return np.dtype(np.float32)
    return np.dtype(f"{'i' if slices[0].signed else 'u'}{slices[0].bits // 8}")


def read_pixels(slices: tuple[Slice, ...]) -> np.ndarray:
    """Read the pixels of a volume's slices, several files at once.

    Args:
        slices: in order; each of one size.

    Returns:
        (slices, rows, columns), of `value_type`.

    Raises:
        VolumeError: the pixels of a slice cannot be read or decoded.
    """
    voxels = np.empty((len(slices), slices[0].rows, slices[0].columns), value_type(slices))
    of_file: dict[object, list[int]] = {}
    for place in sorted(range(len(slices)), key=lambda place: slices[place].frame):
        of_file.setdefault(slices[place].file, []).append(place)

    def read(places: list[int]) -> None:
        place = places[0]
        try:
            found = _pixels([slices[place] for place in places])
            for place, pixels in zip(places, found, strict=True):
                _store(pixels, voxels[place], slices[place])
        except MemoryError:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, DecoderError) else type(error).__name__
            raise VolumeError(
                f"the pixels of {slices[place].label} cannot be read ({reason})"
            ) from None

    for _ in _pool.map(read, of_file.values()):
        pass
    return voxels


def _store(pixels: np.ndarray, target: np.ndarray, one: Slice) -> None:
    """Write a slice's pixels to its place in the volume, as HU where that is of floats."""
    in_hu = target.dtype.kind == "f"
    if pixels.shape != target.shape or not (in_hu or np.can_cast(pixels.dtype, target.dtype)):
        raise ValueError("another size or type")
    target[:] = one.slope * pixels.astype(np.float64) + one.intercept if in_hu else pixels


if __name__ == "__main__":
    main()
