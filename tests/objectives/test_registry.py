"""The tables of options that methods bring with them."""

import pytest

from sotalign_jax.config import default_config
from sotalign_jax.objectives import DIVERGENCES, OBJECTIVES, option_tables
from sotalign_jax.objectives.base import Divergence
from sotalign_jax.objectives.options import options


@options
class Own:
    """Options of one field."""

    strength: float = 1.0


def test_a_table_for_each_method_that_has_options(monkeypatch):
    assert {"fusemix", "clip", "structure", "sclip", "nnclr"} <= option_tables().keys()
    monkeypatch.setitem(DIVERGENCES, "mine", Divergence(lambda *_: None, options=Own))
    assert option_tables()["mine"] is Own
    assert default_config().mine.strength == 1.0


@pytest.mark.parametrize("name", ["clip", "fusemix"])
def test_two_methods_cannot_share_a_table(name, monkeypatch):
    monkeypatch.setitem(DIVERGENCES, name, Divergence(lambda *_: None, options=Own))
    with pytest.raises(TypeError, match=f"{name}: two methods with options cannot have one name"):
        option_tables()


def test_a_table_cannot_take_the_name_of_a_field(monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "teacher", Divergence(lambda *_: None, options=Own))
    with pytest.raises(
        TypeError, match="teacher: a method with options needs a name that no field"
    ):
        default_config()
    assert "teacher" not in OBJECTIVES
