"""The settings of a prefill, and what follows from them before anything touches the device."""
