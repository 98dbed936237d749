"""The tree of errors: what the user must change ends with status 2, wherever it is found out."""

import numpy as np
import pytest

from prism_assets import errors
from prism_assets.errors import PrismError, SettingsError, UserMistake, error_named


def kinds(of: type) -> list[type]:
    return [one for child in of.__subclasses__() for one in (child, *kinds(child))]


def test_every_error_is_found_by_its_name_and_has_the_status_of_its_branch():
    for kind in kinds(PrismError):
        assert error_named(kind.__name__) is kind and kind.__module__ == errors.__name__
        if issubclass(kind, UserMistake):
            assert kind.exit_status == 2, kind
    assert error_named("ValueError") is None and error_named(None) is None


def test_a_budget_that_holds_no_row_is_the_users_to_change():
    from prism_assets.selection.ordering import cut

    with pytest.raises(SettingsError, match="raise selection.budget") as caught:
        cut(np.array([50]), kind="tokens", amount=49, pool_rows=1)
    assert isinstance(caught.value, ValueError)


def test_more_checkpoints_than_steps_and_no_steps_at_all_are_the_users_to_change():
    from prism_assets.sft.checkpoints import checkpoint_steps
    from prism_assets.sft.trainer import Training

    with pytest.raises(SettingsError, match="3 checkpoints of 2 training steps"):
        checkpoint_steps(2, 3)
    with pytest.raises(SettingsError, match="nothing to train"):
        Training(epochs=0.0).number_of_steps(10)


def test_a_device_that_is_not_there_is_the_users_to_change(monkeypatch):
    from prism_assets.resources.index import store

    monkeypatch.setattr(store, "_cuda_found", lambda: False)
    with pytest.raises(SettingsError, match="set device: cpu or auto"):
        store.VectorStore(device="cuda")._device()


def test_what_failed_for_want_of_memory_or_diverged_is_still_what_python_calls_it():
    assert issubclass(errors.TooLittleMemory, MemoryError) and issubclass(errors.TrainingDiverged, FloatingPointError)
