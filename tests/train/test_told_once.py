"""What all processes of a job meet alike is printed by one of them."""

from watched_jobs import Job


def test_a_folder_in_the_way_before_the_first_step(small, tmp_path):
    (tmp_path / "run" / "align").mkdir(parents=True)
    (tmp_path / "run" / "align" / "checkpoints").write_text("")
    with Job([*small, f"output_dir={tmp_path / 'run'}"], tmp_path) as job:
        assert job.exit_codes(60) == [2, 2]
        words = job.words()
    assert words.count("error: ") == 1, words
    assert "checkpoints" in words and '"step": 1' not in words


def test_a_misspelt_key(small, tmp_path):
    with Job([*small, "stages.align.stepz=1"], tmp_path) as job:
        assert job.exit_codes(60) == [2, 2]
        words = job.words()
    assert words.count("error: ") == 1 and "stepz" in words, words
