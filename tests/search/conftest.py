import pytest


@pytest.fixture(scope="package", autouse=True)
def exact():
    """What these tests compare is compared number for number: fp32 wherever nobody says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embedtune.encoder.encode.fast_precision", lambda device: "fp32")
        yield
