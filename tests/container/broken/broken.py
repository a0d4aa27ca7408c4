"""A team's program that is broken on purpose: `broken.py DEFECT`, beside inputs/ and outputs/.

It labels a corner of the volume as liver and needs nothing but Python. Defects:

    none           it is as it must be
    misnamed       the label map is called as the input
    misshapen      without the last slice
    unplaced       the affine is lost
    fractions      half labels, as float32
    foreign        a label that is none
    random         another label map each time
    litters        a second label map beside it
    crashes        exit code 3
    downloads      asks for the network
    hangs          never ends
    greedy         takes 4 GB of memory
    writes         writes beside itself, which a read-only image does not let it
    shares         takes 100 MB of shared memory
    careless       writes a label map of half a file
"""

import gzip
import os
import struct
import sys
import time
import urllib.request
import zlib
from pathlib import Path

LIVER = 1

defect = sys.argv[1]
(image,) = Path("inputs").iterdir()
name = image.name.removesuffix("_0000.nii.gz")

if defect == "crashes":
    sys.exit(3)
if defect == "hangs":
    time.sleep(1000)
if defect == "downloads":
    urllib.request.urlopen("http://weights.invalid/model.pt")  # a name that never resolves
if defect == "greedy":
    hoard = bytearray(4 << 30)
    hoard[::4096] = b"x" * (len(hoard) // 4096)
if defect == "writes":
    Path("cache").write_text("something", encoding="utf-8")
if defect == "shares":
    with open("/dev/shm/tensors", "wb") as shared:  # noqa: PTH123
        for _ in range(100):
            shared.write(bytes(1 << 20))

packed = image.read_bytes()
if defect == "careless":
    content = zlib.decompressobj(31).decompress(packed)
else:
    content = gzip.decompress(packed)
header = bytearray(content[:352])
shape = list(struct.unpack_from("<3h", header, 42))
if defect == "misshapen":
    shape[2] -= 1
if defect == "unplaced":
    struct.pack_into("<2h", header, 252, 0, 1)  # by the sform alone
    struct.pack_into("<12f", header, 280, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)

voxels = shape[0] * shape[1] * shape[2]
labels = bytearray(voxels)
labels[: voxels // 2] = bytes([LIVER]) * (voxels // 2)
if defect == "foreign":
    labels[0] = 15
if defect == "random":
    labels[: voxels // 2] = bytes(byte % 15 for byte in os.urandom(voxels // 2))
datatype, bits, data = 2, 8, bytes(labels)
if defect == "fractions":
    datatype, bits = 16, 32
    data = struct.pack(f"<{voxels}f", *(label / 2 for label in labels))

struct.pack_into("<3h", header, 42, *shape)
struct.pack_into("<2h", header, 70, datatype, bits)
struct.pack_into("<3f", header, 108, 352, 1, 0)  # where voxels begin, slope, intercept
label_map = gzip.compress(bytes(header) + data, mtime=0)
called = image.name if defect == "misnamed" else f"{name}.nii.gz"
(Path("outputs") / called).write_bytes(label_map)
if defect == "litters":
    (Path("outputs") / f"{name}_probabilities.nii.gz").write_bytes(label_map)
