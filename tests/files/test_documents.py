import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fuzz.worker import Write, in_child, outcome_of
from msfp_cli.errors import CheckpointError, RunError, UsageError
from msfp_cli.files.documents import (
    Json,
    digest,
    open_tensors,
    read_header,
    read_json,
    read_tensors,
    refuse_altered,
    write_json,
)
from troubles import drop_rights

# Reading: whatever is wrong with a file becomes one line that names it and ends with what to type.

REDO = "run `msfp again`"


def count_of(document: Json) -> int:
    """Read what the reading tests write."""
    if document["count"] < 0:
        raise UsageError(f"a count of {document['count']} is not possible")
    return int(document["count"] + len(document["names"]))


def json_file(path: Path, text: str | bytes) -> Callable[[], int]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return lambda: read_json(path, count_of, redo=REDO, schema=1)


def header_file(path: Path, text: str | bytes) -> Callable[[], int]:
    save_file({"x": torch.zeros(2)}, path, metadata={"ours": str(text)})
    return lambda: read_header(path, "ours", count_of, redo=REDO, schema=1)


GOOD = json.dumps({"schema": 1, "count": 2, "names": ["a"]})
FILES = pytest.mark.parametrize("make", [json_file, header_file])


@FILES
def test_documents_are_parsed(tmp_path: Path, make: Callable[..., Callable[[], int]]) -> None:
    assert make(tmp_path / "x", GOOD)() == 3


@FILES
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        GOOD + GOOD,
        "null",
        "3",
        "[]",
        b"\xff\xfe\xfd",
        json.dumps({"schema": 1, "count": 2}),
        json.dumps({"schema": 1, "count": "two", "names": []}),
        json.dumps({"schema": 1, "count": 2, "names": None}),
        json.dumps({"schema": 1, "count": -2, "names": []}),
        json.dumps({"schema": "one", "count": 2, "names": []}),
        json.dumps({"count": 2, "names": []}),
    ],
)
def test_document_of_another_form_is_damaged(
    tmp_path: Path, make: Callable[..., Callable[[], int]], text: str | bytes
) -> None:
    with pytest.raises(CheckpointError, match=r"^\S*/x is damaged \(.+\); run `msfp again`$"):
        make(tmp_path / "x", text)()


@FILES
def test_newer_document_is_named_before_its_unknown_form(
    tmp_path: Path, make: Callable[..., Callable[[], int]]
) -> None:
    read = make(tmp_path / "x", json.dumps({"schema": 2}))
    with pytest.raises(
        CheckpointError, match="x was written by a newer msfp; upgrade msfp, or run `msfp again`$"
    ):
        read()


def test_document_without_a_schema_may_do_without(tmp_path: Path) -> None:
    write_json(tmp_path / "x", [1, "é"])
    assert read_json(tmp_path / "x", list, redo=REDO) == [1, "é"]


def test_header_without_our_key_is_damaged(tmp_path: Path) -> None:
    for metadata in (None, {"theirs": "{}"}):
        save_file({"x": torch.zeros(2)}, tmp_path / "x", metadata=metadata)
        with pytest.raises(CheckpointError, match="x is damaged .its header has no 'ours'.; run"):
            read_header(tmp_path / "x", "ours", count_of, redo=REDO)


READERS: dict[str, Callable[[Path], object]] = {
    "json": lambda path: read_json(path, count_of, redo=REDO),
    "header": lambda path: read_header(path, "ours", count_of, redo=REDO),
    "tensors": lambda path: read_tensors(path, redo=REDO),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["x", "a file/x"])
def test_missing_file_says_what_to_type(tmp_path: Path, reader: str, name: str) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(RunError, match=f"/{name} is missing; run `msfp again`$"):
        READERS[reader](tmp_path / name)


@pytest.mark.parametrize("reader", READERS)
def test_file_that_may_not_be_read_is_not_called_missing(tmp_path: Path, reader: str) -> None:
    (tmp_path / "x").touch(0o000)

    def read(write: Write) -> None:
        drop_rights()
        write(outcome_of(lambda path: str(READERS[reader](path)), tmp_path / "x", ""))

    assert "x cannot be read: Permission denied" in in_child(read).words


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_truncated_tensors_are_damaged(tmp_path: Path, keep: int) -> None:
    save_file({"x": torch.arange(99)}, tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"/x is damaged \(.+\); run `msfp again`$"):
        read_tensors(tmp_path / "x", redo=REDO)


def test_tensors_come_back_and_a_lost_one_is_damage(tmp_path: Path) -> None:
    written = {"x": torch.arange(9), "a": torch.zeros(0)}
    save_file(written, tmp_path / "x")
    assert same(read_tensors(tmp_path / "x", redo=REDO), written)
    with pytest.raises(CheckpointError, match="/x is damaged .*; run `msfp again`$"):
        with open_tensors(tmp_path / "x", redo=REDO) as opened:
            opened.get_tensor("y")


def test_what_the_block_raises_is_not_taken_for_damage(tmp_path: Path) -> None:
    save_file({"x": torch.arange(9)}, tmp_path / "x")
    with pytest.raises(KeyError), open_tensors(tmp_path / "x", redo=REDO):
        raise KeyError("the caller's own")


def test_altered_tensors_are_refused(tmp_path: Path) -> None:
    written = {"x": torch.arange(9)}
    refuse_altered(tmp_path / "x", written, digest(written), redo=REDO)
    with pytest.raises(CheckpointError, match="/x is altered: .*; run `msfp again`$"):
        refuse_altered(tmp_path / "x", {"x": torch.arange(8)}, digest(written), redo=REDO)


tensors = st.dictionaries(
    st.sampled_from("abc"),
    st.lists(st.integers(0, 3), max_size=3).map(
        lambda numbers: torch.tensor(numbers, dtype=torch.uint8)
    ),
    max_size=3,
)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@given(tensors, tensors)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_digests_are_equal_just_where_the_tensors_are(
    one: dict[str, Tensor], other: dict[str, Tensor]
) -> None:
    assert (digest(one) == digest(other)) == same(one, other)
    assert digest(dict(reversed(one.items()))) == digest(one)


def test_digest_tells_types_and_shapes_of_equal_bytes_apart() -> None:
    zeros = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(8, dtype=torch.bfloat16),
    ]
    assert len({digest({"a": tensor}) for tensor in zeros}) == len(zeros)
