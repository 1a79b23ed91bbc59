import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from seed 0 with an empty parameter store, and leaves Pyro's validation on."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    yield
    pyro.enable_validation(True)
