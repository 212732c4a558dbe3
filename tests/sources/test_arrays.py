from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.errors import ConfigError
from shoal.lanes import Part
from shoal.sources import Arrays


def test_a_type_that_numpy_lacks_is_gathered_as_it_is() -> None:
    values = torch.randn(9, 2).to(torch.bfloat16)
    (found,) = Arrays(values, block_rows=3).open().gather([Part(2, np.array([1, 0])), Part(0, np.array([2]))])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, values[[7, 6, 2]])


def test_blocks_are_of_the_size_asked_for_and_the_last_is_short() -> None:
    assert Arrays(np.zeros(10), block_rows=4).block_sizes() == (4, 4, 2)
    assert Arrays(np.zeros(0)).block_sizes() == ()


def test_arrays_of_unequal_length_are_named() -> None:
    with pytest.raises(ConfigError, match="image: 3, label: 2"):
        Arrays(image=np.zeros((3, 2)), label=np.zeros(2))


@pytest.mark.parametrize("value", [np.array(["a"]), np.array([None]), np.zeros(2, ">f4"), np.zeros(2, "M8[s]")])
def test_what_no_tensor_can_hold_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="array label must be of numbers that a tensor can hold"):
        Arrays(label=value)


def test_a_number_has_no_rows() -> None:
    with pytest.raises(ConfigError, match="array 1 must have rows"):
        Arrays(np.zeros(1), 3.0)


def test_arrays_by_place_and_by_name_do_not_mix() -> None:
    with pytest.raises(ConfigError, match="not both"):
        Arrays(np.zeros(1), label=np.zeros(1))
    with pytest.raises(ConfigError, match="not both"):
        Arrays()


def test_a_block_has_rows() -> None:
    with pytest.raises(ConfigError, match="block_rows must be at least 1"):
        Arrays(np.zeros(1), block_rows=0)


def test_a_file_that_is_missing_cut_or_no_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "cut.npy", np.zeros(1000))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:500])
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").touch()
    for name in ("absent.npy", "cut.npy", "text.npy", "empty.npy"):
        with pytest.raises(ConfigError, match=f"array x cannot be read from .*{name}"):
            Arrays(x=tmp_path / name)


def test_a_file_of_several_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    with pytest.raises(ConfigError, match="must be one array"):
        Arrays(tmp_path / "two.npz")
