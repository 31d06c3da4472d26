"""Instructions as other tools store them."""

import numpy as np
import pytest

from openvla_jax.data import DataError
from openvla_jax.data.text import decode, instructions, literal, suspicion
from openvla_jax.errors import InputError

CUP = "pick up the cup"
TWO = ["reach for the cup", "reach for the cup", "lift it"]


@pytest.mark.parametrize(
    "value",
    [
        CUP,
        CUP.encode(),
        np.array(CUP),
        np.array(CUP.encode()),
        np.str_(CUP),
        np.array([CUP]),
        np.array([[CUP.encode()]]),
        np.array([CUP] * 3),
        np.array([[CUP]] * 3),
        np.array([CUP.encode()] * 3),
        np.array([CUP] * 3, object),
        [CUP],
        (CUP, CUP.encode(), np.bytes_(CUP.encode())),
    ],
    ids=repr,
)
def test_instructions_are_text_in_whatever_form_they_are_stored(value):
    texts = instructions(value, 3, "here")
    assert texts == [CUP] * 3 and {type(text) for text in texts} == {str}


@pytest.mark.parametrize("value", [TWO, np.array(TWO), np.array([text.encode() for text in TWO])])
def test_instructions_that_change_stay_with_their_steps(value):
    assert instructions(value, 3, "here") == TWO


@pytest.mark.parametrize(
    "text",
    ["拿起红色杯子", "pick up the ☕", "prends l'épingle", "put the $5 bill next to the $10 bill", "(slowly) pick"],
)
def test_instructions_in_utf8_are_kept(text):
    assert instructions(text.encode(), 1, "here") == [text] and suspicion(text) == ""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"^here: the instruction is None \(NoneType\), not text$"),
        (3, r"^here: the instruction is 3 \(int\), not text$"),
        (np.array(3.5), r"3.5 \(float\), not text"),
        (np.arange(3), r"^here, step 0: the instruction is 0 \(int\), not text$"),
        (np.array([CUP, None, CUP], object), r"^here, step 1: the instruction is None"),
        ([["pick"], ["up"], ["it"]], r"^here, step 0: the instruction is \['pick'\] \(list\), not text$"),
        ({"text": CUP}, r"\(dict\), not text"),
        (np.array([[CUP] * 2] * 2), r"instructions have shape \[2, 2\]"),
        ([CUP] * 2, r"^here: 2 instructions for 3 steps: give one text, or one per step$"),
        ([], r"0 instructions for 3 steps"),
        ("", r"^here: instruction '' is empty"),
        (" \n", r"is empty"),
        ("<image>", r"is empty"),
        ([CUP, CUP, "\u3000"], r"^here, step 2: instruction '\\u3000' is empty"),
        ("pick \udce9", r"half a surrogate pair"),
        ("prends l'épingle".encode("latin-1"), r"not UTF-8 but Latin-1 .*\(byte 0xe9 at 9\): store it as UTF-8"),
        (CUP.encode("utf-16"), r"not UTF-8 but UTF-16"),
        (CUP.encode("utf-16-le"), r"holds NUL characters"),
        ("None", r"'None' looks like a printed Python value"),
        (str(CUP.encode()), r"looks like a printed"),
        (str(np.array([CUP])), r"looks like a printed"),
        (repr(np.bytes_(CUP.encode())), r"looks like a printed"),
        (str(TWO), r"looks like a printed"),
        ("7", r"looks like a printed"),
        ("nan", r"looks like a printed"),
    ],
    ids=repr,
)
def test_instructions_that_are_no_text_are_refused(value, message):
    with pytest.raises(DataError, match=message) as caught:
        instructions(value, 3, "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"prends l'\xe9pingle", b" <image> ", "\u3000".encode()])
def test_decode_refuses_what_training_stops_at(raw):
    with pytest.raises(InputError):
        decode(raw)


@pytest.mark.parametrize(
    "text", ["put the $5 bill next to the $10 bill", "pick up the cup labelled $x_{$", r"a \$ b", "$"]
)
def test_literal_text_is_drawn_as_it_is(text):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib.text import Text

    assert Text(text=literal(text))._preprocess_math(literal(text)) == (text, False)
