"""The configuration contract: one schema, read and checked before anything heavy is imported."""

from hjepa.config.load import as_config, dump_config, load_config, resolve
from hjepa.config.schema import Config

__all__ = ["Config", "as_config", "dump_config", "load_config", "resolve"]
