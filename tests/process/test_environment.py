from cogds.process.environment import environment_variables


def test_variables_are_selected_by_prefix():
    environ = {"NCCL_B": "1", "NCCL_A": "2", "X_NCCL_": "3", "GLOO_C": "4"}
    assert environment_variables("NCCL_", "GLOO_", environ=environ) == {"GLOO_C": "4", "NCCL_A": "2", "NCCL_B": "1"}
