"""A prepared folder is what its domains.json says, and says nothing about files elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inputs import write_data_in

from shear_tron.data.manifest import Manifest


def shard(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["domains"]["a"]["train"][0]
    return found


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda all_: shard(all_).update(file="/etc/passwd"), "is no path inside the folder"),
        (lambda all_: shard(all_).update(file="x/../../y.ds"), "is no path inside the folder"),
        (lambda all_: shard(all_).update(file="x\0.ds"), "is no path inside the folder"),
        (lambda all_: all_.update(domains={"../a": all_["domains"]["a"]}), "is no name of a folder"),
        (lambda all_: all_.update(domains={"a" * 300: all_["domains"]["a"]}), "is no name of a folder"),
        (lambda all_: shard(all_).update(file="other.ds"), r"shard 'other.ds' of .* is missing"),
        (lambda all_: shard(all_).update(documents=3), r"shard train.ds.index of .* has 16 bytes, not 24"),
    ],
    ids=["absolute", "above", "zero", "domain above", "long domain", "missing", "index"],
)
def test_what_is_elsewhere_or_of_another_size_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], match: str
) -> None:
    write_data_in(tmp_path / "data")
    file = tmp_path / "data" / "domains.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match) as error:
        Manifest.read(str(tmp_path / "data"))
    assert "run `shear-tron prepare` again" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_said_of_shards_can_be_read_without_them(tmp_path: Path) -> None:
    write_data_in(tmp_path / "data")
    whole = Manifest.read(str(tmp_path / "data"))
    for file in (tmp_path / "data").rglob("*.ds"):
        file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        Manifest.read(str(tmp_path / "data"))
    assert Manifest.read(str(tmp_path / "data"), shards=False) == whole
