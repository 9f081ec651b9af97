"""A run that is hit by one fault of each kind in a row (soak.py; fifty by hand, in docs/reliability.md)."""

import tempfile
from pathlib import Path

import cluster_jobs
import pytest
from soak import FAULTS, soak

pytestmark = [*cluster_jobs.MARKS, pytest.mark.timeout(1800)]


def test_each_kind_of_fault_is_survived_and_nothing_is_lost(folder):
    with tempfile.TemporaryDirectory() as place, cluster_jobs.local_cluster(Path(place)) as cluster:
        report = soak(cluster_jobs.prepare(folder), cluster, faults=len(FAULTS), seed=1)
        assert {row[0] for row in report.rows} == {f.__name__.replace("_", " ") for f in FAULTS}
        assert report.good, report.text()
        assert not [pid for pid in cluster.processes() if cluster_jobs.name_of(pid).startswith("python")]
