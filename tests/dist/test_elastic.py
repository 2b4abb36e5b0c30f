"""A run resumes with another number of ranks and ZeRO stage. All pairs: `python tests/dist/elastic.py`."""

import itertools

import pytest

from tests.dist.elastic import CONFIGS, LAYOUTS, RANKS, covering, full_covering, run_matrix

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_every_layout_resumes_from_another(tmp_path):
    pairs = covering()
    assert {source for source, _ in pairs} == {target for _, target in pairs} == set(LAYOUTS)
    for index, values in enumerate((RANKS, CONFIGS)):
        changes = {(source[index], target[index]) for source, target in pairs}
        assert changes >= set(itertools.permutations(values, 2))
    differences, errors = run_matrix(tmp_path, pairs)
    assert errors == []
    assert set(differences) == set(pairs)


def test_full_fine_tunes_resume_from_another_layout(tmp_path):
    differences, errors = run_matrix(tmp_path, full_covering(), method="full")
    assert errors == []
    assert set(differences) == set(full_covering())
