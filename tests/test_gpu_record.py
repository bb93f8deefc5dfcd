"""The committed kernels are those that passed on a GPU."""

import gpu_record


def test_the_record_is_of_these_sources():
    assert gpu_record.complaint() is None


def test_a_changed_kernel_is_noticed(monkeypatch, tmp_path):
    changed = tmp_path / "cuda" / "kernels" / "x.cu"
    changed.parent.mkdir(parents=True)
    changed.write_text("// one")
    monkeypatch.setattr(gpu_record, "ROOT", tmp_path)
    before = gpu_record.digest()
    changed.write_text("// two")
    assert gpu_record.digest() != before


def test_failures_and_a_missing_record_are_complaints(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_record, "RECORD", tmp_path / "record.json")
    assert "no GPU run" in gpu_record.complaint()
    good = f'{{"digest": "{gpu_record.digest()}", "passed": 3, "failed": 1}}'
    gpu_record.RECORD.write_text(good)
    assert "failed 1" in gpu_record.complaint()
    gpu_record.RECORD.write_text(good.replace('"failed": 1', '"failed": 0'))
    assert gpu_record.complaint() is None
