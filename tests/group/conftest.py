"""Real endpoints for tests, over every wire, in one process, as the tests of ``endpoint`` have them."""

from endpoint_stage import brake, pytest_generate_tests, stage

__all__ = ["brake", "pytest_generate_tests", "stage"]
