import hashlib
import mmap
from collections.abc import Callable
from pathlib import Path

import pytest

from msfp_cli.errors import CheckpointError, MsfpError, RunError
from msfp_cli.files import seal
from msfp_cli.files.directories import replace_directory
from msfp_cli.files.seal import MARK, Seal, SealedFile, checked

REDO = "run `msfp again`"


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A directory with its seal."""
    with replace_directory(tmp_path / "export") as temporary:
        (temporary / "unet").mkdir()
        (temporary / "model_index.json").write_text("index")
        (temporary / "unet" / "config.json").write_text("config")
        (temporary / "unet" / "model.safetensors").write_bytes(bytes(3 << 20))
    return tmp_path / "export"


FILES = ("model_index.json", "unet/config.json", "unet/model.safetensors")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], object], type[MsfpError], str]] = {
    "flipped": (flip, CheckpointError, "is altered: it is not the file that msfp wrote"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), CheckpointError, "is altered"),
    "lost": (Path.unlink, RunError, "is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FILES)
def test_every_file_is_sealed(sealed: Path, name: str, change: str) -> None:
    alter, kind, message = CHANGES[change]
    with checked(sealed, redo=REDO):
        pass
    alter(sealed / name)
    with pytest.raises(kind, match=f"^{sealed / name} {message}.*; run `msfp again`$"):
        with checked(sealed, redo=REDO):
            assert name.endswith(".safetensors"), "a small file was used before it was compared"


def test_an_altered_file_is_named_before_what_it_breaks(sealed: Path) -> None:
    flip(sealed / "unet" / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors is altered"):
        with checked(sealed, redo=REDO):
            raise ValueError("it is in no known format")
    (sealed / "unet" / "model.safetensors").write_bytes(bytes(3 << 20))
    with pytest.raises(ValueError, match="known format"), checked(sealed, redo=REDO):
        raise ValueError("it is in no known format")


@pytest.mark.parametrize("is_read", (True, False))
def test_a_directory_that_is_replaced_while_it_is_read_is_refused(
    sealed: Path, is_read: bool
) -> None:
    """Each half is unaltered, and what looks altered need not be downloaded again."""
    with pytest.raises(RunError, match=f"^{sealed} was replaced while it was read; load it again"):
        with checked(sealed, redo=REDO):
            with replace_directory(sealed, overwrite=True) as temporary:
                (temporary / "model_index.json").write_text("another index")
            if is_read:
                raise ValueError("the old index names a file that the new directory has not")


def test_nothing_is_compared_again_inside_of_a_comparison(
    sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    monkeypatch.setattr(
        Seal, "refuse_altered", lambda _self, _directory, names, **_: compared.extend(names)
    )
    with checked(sealed, redo=REDO), checked(sealed, redo=REDO):
        pass
    assert sorted(compared) == sorted(Seal.of(sealed).files)


def test_files_that_nothing_loads_may_be_added(sealed: Path) -> None:
    (sealed / "README.md").write_text("mine")
    (sealed / "pictures").mkdir()
    (sealed / "pictures" / "cat.png").write_text("mine")
    with checked(sealed, redo=REDO):
        pass
    (sealed / "unet" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="index.json was not written by msfp; run `msfp ag"):
        with checked(sealed, redo=REDO):
            pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"schema": 1, "files": {}}'])
def test_damaged_seal_is_refused(sealed: Path, content: str) -> None:
    (sealed / MARK).write_text(content)
    with pytest.raises(CheckpointError, match="msfp.json is damaged .*; run `msfp again`$"):
        with checked(sealed, redo=REDO):
            pass


def test_altered_seal_is_refused(sealed: Path) -> None:
    text = (sealed / MARK).read_text()
    (sealed / MARK).write_text(text.replace('"size": 5', '"size": 6'))
    with pytest.raises(CheckpointError, match="msfp.json is altered: .*; run `msfp again`$"):
        Seal.load(sealed, redo=REDO)


def test_directory_without_a_seal_is_not_compared(sealed: Path) -> None:
    (sealed / MARK).unlink()
    flip(sealed / "unet" / "config.json")
    with checked(sealed, redo=REDO):
        pass


def test_a_seal_that_was_made_again_is_the_same(sealed: Path) -> None:
    before = (sealed / MARK).read_bytes()
    assert Seal.of(sealed).to_text().encode() == before
    assert tuple(Seal.of(sealed).files) == FILES


@pytest.mark.parametrize("further", [-1, 0, 1])
@pytest.mark.parametrize("windows", [0, 1, 2])
def test_a_file_is_hashed_window_by_window(
    windows: int, further: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = mmap.ALLOCATIONGRANULARITY
    monkeypatch.setattr(seal, "_WINDOW", window)
    content = bytes(i % 251 for i in range(max(0, windows * window + further)))
    path = tmp_path / "file"
    path.write_bytes(content)
    expected = SealedFile(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    assert SealedFile.of(path) == expected
