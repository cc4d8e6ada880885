"""Headers of strangers' files."""

import io
import json
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from studio.adapters.header import MAX_HEADER_BYTES, encode_header, read_header
from studio.errors import AdapterError, StudioError

GOOD = {"a.weight": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}


def _file(
    tmp_path: Path, header: object, data: bytes = bytes(12), *, name: str = "style.safetensors"
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / name
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _entry(**change: object) -> dict[str, object]:
    return {"a.weight": {**GOOD["a.weight"], **change}}


def test_header_of_the_librarys_own_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "b": torch.zeros(2, 3, dtype=torch.bfloat16),
        "a.alpha": torch.tensor(1.0),
        "c": torch.zeros(0, 4),
    }
    safetensors.torch.save_file(tensors, path, metadata={"ss_seed": "1", "note": "ü\n"})
    header = read_header(path)
    assert header.tensors == {"a.alpha": ("F32", ()), "b": ("BF16", (2, 3)), "c": ("F32", (0, 4))}
    assert header.metadata == {"ss_seed": "1", "note": "ü\n"}
    assert path.stat().st_size - header.data_start == 4 + 12


def test_encoded_header_is_as_long_as_the_librarys_and_readable_by_it() -> None:
    tensors, metadata = (
        {"b": torch.arange(3.0), "a": torch.ones(2, 2).half()},
        {"n": 'ü"\n\x01\\/', "ss_x": "{}"},
    )
    theirs = safetensors.torch.save(tensors, metadata)
    length = 8 + int.from_bytes(theirs[:8], "little")
    entries = json.loads(theirs[8:length])
    del entries["__metadata__"]
    ours = encode_header(entries, metadata)
    assert len(ours) == length
    assert torch.equal(safetensors.torch.load(ours + theirs[length:])["b"], tensors["b"])


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            bytes(1),
            "names 'a' twice",
        ),
        (
            b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            bytes(1),
            "names 'dtype' twice",
        ),
        (b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1), "does not begin with '{'"),
        (b'{"a": \xff}', b"", "not valid JSON in UTF-8"),
        (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
        (b"{" + b"1" * 5000, b"", "not valid JSON"),
        (b"[]", b"", "does not begin with '{'"),
        ({}, b"", "holds no tensors"),
        ({"__metadata__": {"a": "b"}}, b"", "holds no tensors"),
        ({"__metadata__": {"rank": 4}, **GOOD}, bytes(12), "metadata holds something other than text"),
        ({"__metadata__": ["a"], **GOOD}, bytes(12), "metadata holds something other than text"),
        (GOOD, bytes(11), "is cut short: it has .* bytes of at least"),
        (GOOD, b"", "is cut short"),
        (GOOD, bytes(13), "1 bytes follow the last tensor"),
        (_entry(data_offsets=[1, 13]), bytes(13), "overlap others or leave a gap"),
        (_entry(data_offsets=[0, 11]), bytes(11), "another number of bytes"),
        (_entry(data_offsets=[12, 0]), bytes(12), "another number of bytes"),
        (_entry(shape=[2, -3]), bytes(12), "entry for 'a.weight' is malformed"),
        (_entry(shape=[2, True]), bytes(12), "malformed"),
        (_entry(shape=[2.0, 3]), bytes(12), "malformed"),
        (_entry(shape=[1] * 9), bytes(12), "malformed"),
        (_entry(shape=[2**62, 2**62]), bytes(12), "another number of bytes"),
        (_entry(shape=[2**64]), bytes(12), "malformed"),
        (_entry(data_offsets=[0]), bytes(12), "malformed"),
        (_entry(more=1), bytes(12), "malformed"),
        ({"a.weight": [1]}, b"", "malformed"),
        (_entry(dtype="C64"), bytes(12), "is of type C64; adapters hold F64, F32"),
        (_entry(dtype=["F16"]), bytes(12), "is of type"),
        ({"../../etc/passwd": GOOD["a.weight"]}, bytes(12), "which is no name of a layer"),
        ({"a\n\x1b[2J": GOOD["a.weight"]}, bytes(12), r"called 'a\?\?\[2J', which is no name"),
        ({"a" * 600: GOOD["a.weight"]}, bytes(12), r"aaa\.\.\.', which is no name"),
        ({"": GOOD["a.weight"]}, bytes(12), "which is no name of a layer"),
        ({**GOOD, "b": {"dtype": "U8", "shape": [4], "data_offsets": [10, 14]}}, bytes(14), "overlap others"),
    ],
)
def test_damaged_header_is_refused_and_the_damage_named(
    tmp_path: Path, header: object, data: bytes, words: str
) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        read_header(_file(tmp_path, header, data))
    assert "style.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_header_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{")
    with pytest.raises(AdapterError, match=r"claims a header of 33554433 bytes"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 1000) + b"{")
    with pytest.raises(AdapterError, match=r"is cut short: it has 9 bytes of at least 1008"):
        read_header(path)


@pytest.mark.parametrize("size", range(8))
def test_file_of_a_few_bytes_is_cut_short(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(AdapterError, match=rf"is cut short: it has {size} bytes of at least 8"):
        read_header(path)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('the pickle was opened')",))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickle_is_refused_unopened_and_the_safe_way_named(tmp_path: Path, name: str, protocol: int) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(_Bomb(), protocol=protocol))
    words = (
        "cut short|claims a header"
        if protocol == 0 and name != "x.pt"
        else "is a pickle.*refused.*weights_only=True"
    )
    with pytest.raises(AdapterError, match=words):
        read_header(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files_under_a_safe_name_are_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) is zipped
    with pytest.raises(AdapterError, match=r"is a pickle"):
        read_header(path)


def test_safetensors_file_with_a_pickles_first_bytes_is_read(tmp_path: Path) -> None:
    text = json.dumps(GOOD).encode().ljust(0x280)
    assert read_header(_file(tmp_path, text)).tensors == {"a.weight": ("F16", (2, 3))}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (b"\n<!DOCTYPE html><html>", "is a web page.*Download it again"),
    ],
    ids=["lfs", "html"],
)
def test_what_downloads_leave_behind_is_recognised(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=words):
        read_header(path)


def test_missing_file_names_the_most_similar_one(tmp_path: Path) -> None:
    _file(tmp_path, GOOD, name="dog.safetensors")
    with pytest.raises(AdapterError, match=r"does not exist. Did you mean 'dog.safetensors'\?"):
        read_header(tmp_path / "dgo.safetensors")
    with pytest.raises(AdapterError, match=r"is a folder, .* In it: dog.safetensors"):
        read_header(tmp_path)
    with pytest.raises(AdapterError, match=r"does not exist"):
        read_header(tmp_path / "none" / "x.safetensors")


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    path = _file(tmp_path, GOOD)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(AdapterError, match=r"is cut short"):
            read_header(path)


def test_random_damage_ends_in_a_message_or_in_a_header_the_library_reads_too(tmp_path: Path) -> None:
    source = safetensors.torch.save(
        {"lora_unet_a.lora_down.weight": torch.ones(2, 3), "lora_unet_a.alpha": torch.tensor(1.0)},
        {"ss_seed": "1"},
    )
    rng, path, refused = random.Random(0), tmp_path / "x.safetensors", 0
    for _ in range(1500):
        damaged = bytearray(source)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(8 + int.from_bytes(source[:8], "little"))
            match rng.randrange(3):
                case 0:
                    damaged[at] = rng.randrange(256)
                case 1:
                    damaged.insert(at, rng.choice(b'{}[]",:0129-e.\\u'))
                case _:
                    del damaged[at]
        path.write_bytes(damaged)
        try:
            header = read_header(path)
        except StudioError:
            refused += 1
        else:
            assert safetensors.torch.load(bytes(damaged)).keys() == header.tensors.keys()
    assert 1000 < refused < 1500


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    path = _file(tmp_path, GOOD)
    code = (
        "import sys; from studio.adapters.header import read_header;"
        "from studio.registry import FORMATS, KINDS;"
        f"read_header({str(path)!r}); print(FORMATS.names(), KINDS.names(), 'torch' in sys.modules, sep=';')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    formats, kinds, torch_loaded = done.stdout.split(";")
    assert "'kohya'" in formats and "'lora'" in kinds and torch_loaded.strip() == "False", done.stderr


def test_unreadable_file_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, GOOD)

    def refuse(*_: object, **__: object) -> io.BytesIO:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AdapterError, match=r"cannot be read: Permission denied"):
        read_header(path)
