"""The configuration contract: one schema, read and checked before anything heavy is imported."""

from hjepa.config.load import dump_config, load_config
from hjepa.config.schema import Config

__all__ = ["Config", "dump_config", "load_config"]
