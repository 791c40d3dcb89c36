"""What it costs to change a model: measured in the loaded model, against its own predictions."""

from bitladder.trial.without_block import BlockLoss, blocks_left_out

__all__ = ["BlockLoss", "blocks_left_out"]
