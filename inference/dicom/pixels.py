"""Pixels of DICOM files: native ones are read in threads, compressed ones in processes.

The decoders are C and C++ that damaged data can crash (GDCM did so at 2 of 150 damaged JPEG
streams), and hold the interpreter's lock. So each thread that reads a compressed series has a
process of its own to decode in: `python -m inference.dicom.pixels`, which takes and gives records
of a length and as many bytes, and ends when its standard input does.
"""

import json
import os
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder, iter_pixels
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from inference.dicom.slices import Slice
from inference.memory import cpu_limit
from inference.volume import VolumeError

THREADS = min(4, cpu_limit())
"""Files of a series read at once."""

_DECODER_BYTES = 4 << 30  # address space of a decoding process
_DECODER_SECONDS = 60  # for one slice
_OPTIONS = (
    *("rows", "columns", "samples_per_pixel", "bits_allocated", "bits_stored"),
    *("pixel_representation", "photometric_interpretation"),
)
_PLUGINS = ("pyjpegls", "pillow", "gdcm", "pydicom")
"""Where two can decode the same, the quicker first."""


class DecoderError(ValueError):
    """Compressed pixels that cannot be decoded."""


class Decoder:
    """A process that decodes; started when it is needed, and anew after it crashed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def decode(self, frame: bytes, options: dict) -> np.ndarray:
        """Decode one frame.

        Args:
            frame: as compressed.
            options: of pydicom's decoders, and `transfer_syntax`.

        Returns:
            (rows, columns), of whole numbers.

        Raises:
            DecoderError: it cannot be decoded.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-E", "-m", "inference.dicom.pixels"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],
                start_new_session=True,  # Ctrl-C is for the service, which ends this
            )
        process = self._process
        too_long = threading.Timer(_DECODER_SECONDS, process.kill)
        too_long.start()
        try:
            _send(process.stdin, json.dumps(options).encode(), frame)
            dtype, content = _receive(process.stdout), _receive(process.stdout)
        except (OSError, EOFError):
            self.close()
            raise DecoderError("the decoder crashed") from None
        finally:
            too_long.cancel()
        if not dtype:
            raise DecoderError(content.decode())
        return np.frombuffer(content, dtype.decode()).reshape(options["rows"], options["columns"])

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _send(stream: BinaryIO, *records: bytes) -> None:
    for record in records:
        stream.write(struct.pack("<Q", len(record)))
        stream.write(record)
    stream.flush()


def _receive(stream: BinaryIO) -> bytes:
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError
    content = stream.read(struct.unpack("<Q", size)[0])
    if len(content) < struct.unpack("<Q", size)[0]:
        raise EOFError
    return content


def _serve() -> None:
    """Decode what comes on standard input, until it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_DECODER_BYTES, _DECODER_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the records
    while True:
        try:
            options, frame = json.loads(_receive(sys.stdin.buffer)), _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            pixels = _decoded(frame, options)
        except Exception as error:
            _send(output, b"", type(error).__name__.encode())
        else:
            _send(output, pixels.dtype.str.encode(), pixels.tobytes())


def _decoded(frame: bytes, options: dict) -> np.ndarray:
    syntax = options.pop("transfer_syntax")
    decoder = get_decoder(UID(syntax))
    plugin = next(name for name in _PLUGINS if name in decoder.available_plugins)
    pixels, _ = decoder.as_array(
        encapsulate([frame]),
        decoding_plugin=plugin,
        raw=True,
        number_of_frames=1,
        pixel_keyword="PixelData",
        **options,
    )
    return pixels


def _options(dataset: Dataset) -> dict:
    """What a decoder must be told of a file."""
    words = ("".join(part.capitalize() for part in name.split("_")) for name in _OPTIONS)
    options = dict(zip(_OPTIONS, (dataset[word].value for word in words), strict=True))
    return options | {"transfer_syntax": str(dataset.file_meta.TransferSyntaxUID)}


def _insist_on_a_syntax(dataset: Dataset) -> None:
    """Name the transfer syntax of a file that does not, as files without a preamble."""
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _pixels(dataset: Dataset, frames: list[int], decoder: Decoder) -> Iterator[np.ndarray]:
    """The frames of a file, each (rows, columns)."""
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        yield from iter_pixels(dataset, indices=frames, raw=True)
        return
    wanted, options = set(frames), _options(dataset)
    count = int(dataset.get("NumberOfFrames") or 1)
    for index, frame in enumerate(generate_frames(dataset.PixelData, number_of_frames=count)):
        if index in wanted:
            yield decoder.decode(frame, options)


_idle: list[Decoder] = []


@contextmanager
def _decoder() -> Iterator[Decoder]:
    """A decoder that nobody else uses; its process waits for the next series afterwards."""
    try:
        decoder = _idle.pop()
    except IndexError:
        decoder = Decoder()
    try:
        yield decoder
    finally:
        _idle.append(decoder)


def value_type(slices: tuple[Slice, ...]) -> tuple[np.dtype, bool]:
    """The type in which the slices of a volume are held.

    Returns:
        The type, and whether it holds HU: where slope, intercept or type differ between slices.
        Otherwise it holds what the files do.
    """
    kinds = {(one.slope, one.intercept, one.bits, one.signed) for one in slices}
    if len(kinds) == 1:
        one = slices[0]
        return np.dtype(f"{'i' if one.signed else 'u'}{one.bits // 8}"), False
    if any(one.slope % 1 or one.intercept % 1 for one in slices):
        return np.dtype(np.float32), True
    lowest, highest = 0.0, 0.0
    for one in slices:
        reach = 1 << (one.stored_bits - one.signed)
        ends = [one.slope * end + one.intercept for end in (-reach * one.signed, reach - 1)]
        lowest, highest = min(lowest, *ends), max(highest, *ends)
    for kind in (np.int16, np.int32):
        if np.iinfo(kind).min <= lowest and highest <= np.iinfo(kind).max:
            return np.dtype(kind), True
    return np.dtype(np.float32), True


def read_pixels(slices: tuple[Slice, ...], dtype: np.dtype, *, in_hu: bool) -> np.ndarray:
    """Read the pixels of a volume's slices, several files at once.

    Args:
        slices: in order; each of one size.
        dtype, in_hu: as `value_type` says.

    Returns:
        (slices, rows, columns).

    Raises:
        VolumeError: the pixels of a slice cannot be read or decoded.
    """
    voxels = np.empty((len(slices), slices[0].rows, slices[0].columns), dtype)
    of_file: dict[object, list[int]] = {}
    for place, one in enumerate(slices):
        of_file.setdefault(one.file, []).append(place)
    stop = threading.Event()

    def read(places: list[int]) -> None:
        if stop.is_set():
            return
        places = sorted(places, key=lambda place: slices[place].frame)
        place = places[0]
        try:
            with slices[place].file.open() as stream:
                dataset = pydicom.dcmread(stream, force=True)
            _insist_on_a_syntax(dataset)
            frames = [slices[place].frame for place in places]
            with _decoder() as decoder:
                found = _pixels(dataset, frames, decoder)
                for place, pixels in zip(places, found, strict=True):
                    _put(voxels[place], pixels, slices[place], in_hu=in_hu)
        except MemoryError:
            raise
        except Exception as error:
            stop.set()
            reason = str(error) if isinstance(error, DecoderError) else type(error).__name__
            raise VolumeError(
                f"the pixels of {slices[place].label} cannot be read ({reason})"
            ) from None

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(read, of_file.values()):
            pass
    return voxels


def _put(target: np.ndarray, pixels: np.ndarray, one: Slice, *, in_hu: bool) -> None:
    """Write a slice's pixels into their place, as HU where asked for."""
    if pixels.shape != target.shape:
        raise ValueError("another size")
    if in_hu:
        target[:] = one.slope * pixels.astype(np.float64) + one.intercept
    elif np.can_cast(pixels.dtype, target.dtype):
        target[:] = pixels
    else:
        raise ValueError("another type")


if __name__ == "__main__":
    _serve()
