"""Some hundreds of mutated files; `python -m tests.hostile` runs as many as one likes."""

import pytest

from tests.hostile.campaign import OK, REFUSED, campaign


@pytest.mark.slow
def test_mutated_files_are_segmented_or_refused(tmp_path):
    classes = campaign(seed=7, count=400, folder=tmp_path)
    assert set(classes) == {OK, REFUSED}, {name: found[:3] for name, found in classes.items()}
    assert len(classes[OK]) > 50 and len(classes[REFUSED]) > 50
