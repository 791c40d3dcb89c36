import pytest
from report_card_run import write_run


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path)
