from vissl_lite.data.reading import reason


def test_a_reason_does_not_name_the_file_again() -> None:
    assert reason(ValueError("a/b.png: cut short"), "a/b.png") == "cut short"
    frames = ValueError("a/scan.nii.gz: it has 28 frames, and none is 30")
    assert reason(frames, "a/scan.nii.gz#30") == "it has 28 frames, and none is 30"
