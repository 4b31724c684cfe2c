import pytest

from shared.worker.settings import WorkerSettings


@pytest.mark.parametrize(("set_to", "on_cpu", "on_cuda"), [(None, 0.1, 0.0), (0.0, 0.0, 0.0), (0.5, 0.5, 0.5)])
def test_a_step_is_bounded_in_time_on_a_cpu_and_elsewhere_when_told(tmp_path, set_to, on_cpu, on_cuda):
    settings = WorkerSettings(worker_id="w", transfer_socket=tmp_path / "s", run_dir=tmp_path, max_step_s=set_to)
    assert settings.max_step_s_on("cpu") == on_cpu
    assert settings.max_step_s_on("cuda") == on_cuda
