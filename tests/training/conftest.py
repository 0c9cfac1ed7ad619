"""The models of this folder are small: one thread is the fastest, and gives the same sums every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
