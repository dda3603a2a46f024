"""JSON files that are not as they should be are refused in one line."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vissl_lite.data.json_file import parse_json, read_json
from vissl_lite.errors import UserError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.slow
@given(PLAIN)
def test_what_json_holds_comes_back(content: object) -> None:
    found = parse_json(json.dumps(content).encode(), "it")
    assert json.dumps(found) == json.dumps(content)


@given(st.binary())
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with suppress(UserError):
        parse_json(content, "it")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe{}", "not in UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' * 200_000, "nested too deeply"),
        (b"1" * 400, "has 400 digits"),
        (b"1" * 5000, "has 5000 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' twice"),
        (b'["\\uD800"]', "half a character"),
        (b'{"a": 1', "Expecting ','"),
    ],
)
def test_damage_is_said_in_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is not JSON that can be read: ") as raised:
        read_json(file)
    assert reason in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_names_of_files_need_not_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["caf\\udce9.jpg"]')
    assert os.fsencode(read_json(tmp_path / "a.json")[0]) == b"caf\xe9.jpg"


def test_a_byte_order_mark_and_pairs_of_surrogates_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "a.json") == {"a": "\U0001f600"}


def test_what_is_no_file_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(UserError, match="can't be read"):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="can't be read"):
        read_json(tmp_path / "pipe.json")
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="more than"):
        read_json(tmp_path / "sparse.json")
    (tmp_path / "small.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="6 bytes, more than the 5"):
        read_json(tmp_path / "small.json", largest=5)
