"""Converting adapters between three forms: PEFT's with split layers, PEFT's with fused layers, and loralib's."""
