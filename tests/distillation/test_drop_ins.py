"""What the drop-ins tell of a config that does not fit its data."""

from pathlib import Path

import pytest

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.drop_ins import drop_ins
from tests.data.record_sets import insightface_records, write_records


@pytest.mark.parametrize(("stated", "told"), [(20, False), (19, False), (21, False), (5_822_653, True), (8, True)])
def test_num_image_of_another_set_is_told(
    tmp_path: Path, stated: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write_records(tmp_path, insightface_records([10, 10]))
    config = {"num_classes": 2, "num_image": stated}
    made = drop_ins(lambda: config, distiller=Distiller(KDConfig()))
    assert len(made.get_dataloader(str(tmp_path), 0, 4, num_workers=0).faces) == 20
    assert (f"num_image is {stated}, but the data set holds 20" in caplog.text) is told


def test_what_the_config_and_property_state_wrongly_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_records(tmp_path, insightface_records([10, 10]))
    (tmp_path / "property").write_text("5,112,112\n")
    made = drop_ins(lambda: {"num_classes": 4, "num_image": 100}, distiller=Distiller(KDConfig()))
    made.get_dataloader(str(tmp_path), 0, 4, num_workers=0)
    (said,) = [record.getMessage() for record in caplog.records]
    for number in ("num_image=20", "num_classes is 4", "num_classes=2", "5 classes"):
        assert number in said
    caplog.clear()
    (tmp_path / "property").write_text("2,112,112\n")
    made = drop_ins(lambda: {"num_classes": 2, "num_image": 20}, distiller=Distiller(KDConfig()))
    made.get_dataloader(str(tmp_path), 0, 4, num_workers=0)
    assert caplog.messages == []
