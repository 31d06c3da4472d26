"""Errors of input: `reading` turns whatever a file's reader raises into one line that names the file."""

import json
import struct
import zipfile

import pytest

from openvla_jax.errors import InputError, reading


class OwnError(InputError):
    pass


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("length"), "a.json: has no 'length'; get it again"),
        (IndexError("list index out of range"),
         "a.json: does not have the expected form (IndexError: list index out of range); get it again"),
        (TypeError("'int' object is not iterable"),
         "a.json: does not have the expected form (TypeError: 'int' object is not iterable); get it again"),
        (zipfile.BadZipFile("File is not a zip file"), "a.json: File is not a zip file (BadZipFile); get it again"),
        (struct.error("two\nlines"), "a.json: two lines (error); get it again"),
        (EOFError(), "a.json: EOFError; get it again"),
        (RecursionError("deep"), "a.json: deep (RecursionError); get it again"),
        (MemoryError(), "a.json: needs more memory than there is; get it again"),
        (OSError("image file is truncated"), "a.json: image file is truncated (OSError); get it again"),
        (PermissionError(13, "Permission denied", "a.json"), "a.json: cannot be read: Permission denied"),
    ],
)  # fmt: skip
def test_reading_names_the_file_whatever_is_raised(error, line):
    with pytest.raises(OwnError) as caught, reading("a.json", "get it again", OwnError):
        raise error
    assert str(caught.value) == line
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [InputError("b.json: is empty"), ModuleNotFoundError("No module named 'av'")])
def test_reading_passes_errors_that_name_their_place(error):
    with pytest.raises(type(error)) as caught, reading("a.json"):
        raise error
    assert caught.value is error


def test_reading_does_not_catch_an_interruption():
    with pytest.raises(KeyboardInterrupt), reading("a.json"):
        raise KeyboardInterrupt


def test_reading_keeps_the_message_of_a_parser():
    line = r"^a.json: Expecting value: line 1 column 1 \(char 0\) \(JSONDecodeError\); "
    with pytest.raises(InputError, match=line), reading("a.json"):
        json.loads("")
