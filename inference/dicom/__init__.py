"""DICOM series in, DICOM segmentations out; nothing of it is imported for NIfTI input.

    discovery.py    a folder tree or zip -> Series; naming.py names them without the patient
    slices.py       headers of files of one or many slices -> Slice
    geometry.py     slices -> Stack: order and affine, or the reason why they make none
    pixels.py       the slices' pixels, several files at once, compressed ones in processes
    series.py       Series: what the service reads; gives the `Volume` of `read_volume`
    segmentation.py label map -> DICOM SEG; codes.py has what its segments are called

Geometry is judged by highdicom and not by SimpleITK's series reader. Both were tried on phantoms
that pydicom wrote: SimpleITK 2.5 read a series with a slice missing (4 mm became 5), with one
twice (4 mm became 1.33), of mixed orientations and pixel spacings, with a slice pushed 3 mm aside
and with a tilted gantry as straight volumes. highdicom 0.28 refused each of them, in one sentence
that does not say why, the tilted one too. Both read big-endian and JPEG lossless files; highdicom
needs GDCM for it, but writes the SEG as well, and SimpleITK would cost 264 MB more.
"""
