"""LoRA adapters: reading PEFT directories, and the pool that holds many of them on the device."""
