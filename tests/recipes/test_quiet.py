"""What a recipe holds back of its output, and for how long."""

import logging

from lightning_qat.recipes._quiet import quiet


def test_steps_of_an_export_are_held_back_and_warnings_are_not(caplog):
    caplog.set_level(logging.INFO)
    logger, level = logging.getLogger("onnx_ir.passes.common"), logging.getLogger("onnx_ir").level
    with quiet():
        logger.info("Replaced initializer")
        logger.warning("no such operator")
    logger.info("afterwards")
    assert [record.getMessage() for record in caplog.records] == ["no such operator", "afterwards"]
    assert logging.getLogger("onnx_ir").level == level
