"""What tests/soak.py is asked for, before it has a cluster."""

from contextlib import nullcontext

import pytest
import soak


@pytest.fixture
def soaked(monkeypatch, tmp_path):
    """soaked(*arguments): tests/soak.py with stand-ins for the cluster and the run; what it was to do. In the folder
    are shards, a folder for it, and one with another soak's runs.
    """
    for name in ("shards", "old/runs"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked, report = [], soak.Report(same_curve=True)
    monkeypatch.setattr(soak, "local_cluster", lambda folder: nullcontext())
    monkeypatch.setattr(soak, "soak", lambda folder, cluster, **how: asked.append((folder, how)) or report)

    def soaked(*arguments: str):
        asked.clear()
        assert soak.main(["--shards=shards", *arguments]) == 0
        return asked[0]

    return soaked


def test_a_soak_may_begin_in_a_folder_where_one_could_not_begin(soaked, tmp_path):
    for _ in range(2):
        folder, how = soaked("--folder=new", "--only=requeued,killed_rank")
        assert how["kinds"] == [soak.killed_rank, soak.requeued]
        assert (folder / "shards" / "digits").resolve() == tmp_path / "shards"
    assert soaked()[1]["kinds"] == [*soak.FAULTS]


@pytest.mark.parametrize(
    ("mistake", "says"),
    [("--only=killed_rank,requeue", "there is no requeue; the kinds are"), ("--folder=old", "old has runs already")],
)
def test_mistakes_in_a_soaks_arguments_are_told_before_there_is_a_cluster(soaked, mistake, says, monkeypatch, capsys):
    monkeypatch.delattr(soak, "local_cluster")
    with pytest.raises(SystemExit, match="2"):
        soaked(mistake)
    assert says in capsys.readouterr().err
