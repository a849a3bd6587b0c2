"""The processes of a run; that several do what one does is in `test_trainer`."""

from types import SimpleNamespace

import pytest

from msfp_cli.errors import UsageError
from msfp_cli.finetuning.distributed import refuse_uneven_share


@pytest.mark.parametrize(("num_processes", "lanes"), [(2, 1), (2, 3), (4, 6)])
def test_processes_that_cannot_share_the_calls_of_an_update_are_refused(
    num_processes: int, lanes: int
) -> None:
    accelerator = SimpleNamespace(num_processes=num_processes, process_index=0)
    with pytest.raises(
        UsageError, match=f"{num_processes} processes cannot share {lanes} calls per update evenly"
    ):
        refuse_uneven_share(accelerator, lanes)
