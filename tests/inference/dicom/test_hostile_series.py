"""Some dozens of damaged series; `python -m tests.hostile --dicom` runs as many as one likes."""

import pytest

from tests.hostile.campaign import OK, REFUSED, campaign
from tests.hostile.series import outcome


@pytest.mark.slow
def test_damaged_series_are_read_or_refused_and_the_others_finish(tmp_path):
    classes = campaign(seed=3, count=60, folder=tmp_path, outcome=outcome)
    assert set(classes) == {OK, REFUSED}, {name: found[:3] for name, found in classes.items()}
    assert len(classes[OK]) > 10 and len(classes[REFUSED]) > 10
