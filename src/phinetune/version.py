"""Which version this is, where every layer may ask."""

VERSION = "0.1.0"
