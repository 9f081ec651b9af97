"""metrics.csv survives restarts and crashes."""

from diffusion_trainer.callbacks.csv_logger import CsvLogger


def test_a_restart_goes_on_where_it_starts_and_new_columns_may_come(tmp_path):
    path = tmp_path / "metrics.csv"
    first = CsvLogger(path, 0)
    for images in (10, 20, 30):
        first.log_metrics({"loss": images / 10}, step=images)
    second = CsvLogger(path, 20)  # the checkpoint was at 20
    second.log_metrics({"loss": 3.5}, step=30)
    second.log_metrics({"fid": 7.0}, step=30)
    second.log_metrics({"loss": 4.5}, step=40)
    assert path.read_text().split() == ["images_seen,loss,fid", "10,1.0,", "20,2.0,", "30,3.5,7.0", "40,4.5,"]


def test_what_a_crash_left_half_written_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    for torn in (b"25", b"30,0", b"\0\0\0\0", b"nonsense,1\n", b"30\n"):
        path.write_bytes(b"images_seen,loss\n10,1.0\n20,2.0\n" + torn)
        CsvLogger(path, 100).log_metrics({"loss": 9.0}, step=110)
        assert path.read_text().split() == ["images_seen,loss", "10,1.0", "20,2.0", "110,9.0"], torn
