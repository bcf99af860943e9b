"""Files as datasets, and as splits of other datasets."""

from pathlib import Path

import pytest

from recipes.rows import read_rows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_file_and_a_part_of_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text\n" + "".join(f"row {number}\n" for number in range(10)))
    assert list(read_rows(str(file), None, "train")["text"]) == [f"row {number}" for number in range(10)]
    assert list(read_rows(str(file), None, "train[-20%:]")["text"]) == ["row 8", "row 9"]
    with pytest.raises(ValueError, match='Unknown split "test"'):
        read_rows(str(file), None, "test")


def test_a_file_as_the_split_of_another_dataset(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("one text\nof two lines\n\nanother\n")
    assert list(read_rows("org/name", "subset", str(file))["text"]) == ["one text\nof two lines", "another\n"]
