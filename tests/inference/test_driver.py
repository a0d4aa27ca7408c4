"""The calls of the NVIDIA driver, against a stand-in for it."""

from types import SimpleNamespace

import pytest

from inference.cuda import driver


@pytest.mark.parametrize("code", [0, 100])  # an error is torch's to report
def test_the_driver_is_initialised_in_a_thread(monkeypatch, code):
    calls = []

    def version(reference):
        reference._obj.value = 12040
        return code

    library = SimpleNamespace(
        cuInit=lambda flags: calls.append(flags) or code, cuDriverGetVersion=version
    )
    monkeypatch.setattr(driver, "_library", lambda: library)
    driver.initialise().join()
    assert calls == [0]
    assert driver.cuda_version() == (None if code else (12, 4))


def test_without_a_driver(monkeypatch):
    monkeypatch.setattr(driver, "_library", lambda: None)
    assert driver.initialise() is None
    assert driver.cuda_version() is None
