"""cogds: fine-tuning of CogVideoX with DeepSpeed."""

__version__ = "0.2.0"
